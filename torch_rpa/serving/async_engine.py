"""An engine for asyncio: each request is an asynchronous generator."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from torch_rpa.serving.engine import Engine
from torch_rpa.serving.intake import Params
from torch_rpa.serving.outputs import RequestUpdate

Result = TypeVar("Result")


class AsyncEngine:
    """Runs the steps of an engine in a thread of its own while requests wait.

    One task has the engine to itself: it runs steps as long as there are requests, and
    between two steps what others ask for. Use it from one event loop. ::

        async with AsyncEngine(engine) as server:
            async for update in server.generate(prompt_ids, params):
                print(update.new_tokens)

    A request that fails gets a last update that says so. If ``Engine.step`` raises
    itself, which it does for an error in ``on_step`` alone, every request that runs
    ends with that error, and later ones are served. So they are if somebody cancels the
    task that runs the steps, as ``asyncio.run`` does at its end.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._thread = concurrent.futures.ThreadPoolExecutor(
            1, thread_name_prefix="engine"
        )
        self._calls: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []
        self._queues: dict[str, asyncio.Queue[RequestUpdate | Exception]] = {}
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def generate(
        self,
        prompt_ids: Any,
        params: Params = None,
        *,
        request_id: str | None = None,
    ) -> AsyncGenerator[RequestUpdate, None]:
        """Yields the updates of one request; leaving the loop early cancels it.

        With ``n`` texts, ``update.output.index`` says of which one an update is.

        Args:
            prompt_ids: As in ``Engine.add_request``, which tells what is raised.
            params: Likewise.
            request_id: Likewise.

        Raises:
            RuntimeError: The engine is closed.
        """
        if self._is_closed:
            raise RuntimeError("generate must be called before close")
        queue: asyncio.Queue[RequestUpdate | Exception] = asyncio.Queue()
        added: list[str] = []

        def add() -> None:
            names = self.engine.add_texts(prompt_ids, params, request_id=request_id)
            added.extend(names)
            self._queues.update(dict.fromkeys(names, queue))

        try:
            await self._call(add)
            num_unfinished = len(added)
            while num_unfinished:
                update = await queue.get()
                if isinstance(update, Exception):
                    raise update
                num_unfinished -= update.is_last
                yield update
        finally:
            for name in added:
                if self._queues.pop(name, None) is not None:
                    self._cancel_soon(name)

    async def cancel(self, request_id: str) -> bool:
        """Ends a request, whose generator gets a last update; see ``Engine.cancel``."""
        return await self._call(lambda: self.engine.cancel(request_id))

    async def close(self) -> None:
        """Cancels every request, waits for the last step and ends the thread."""
        self._is_closed = True
        for name in list(self._queues):
            self._cancel_soon(name)
        while self._task is not None and not self._task.done():
            await asyncio.wait([self._task])
        self._thread.shutdown()

    def _cancel_soon(self, name: str) -> None:
        """Cancels a request; does not wait, since its task may be cancelled itself."""
        if self._task is None or self._task.done():  # a new one may outlive the loop
            self.engine.cancel(name)
        else:
            self._call(lambda: self.engine.cancel(name))

    def _call(self, function: Callable[[], Result]) -> asyncio.Future[Result]:
        """Has a function called between two steps."""
        future = asyncio.get_running_loop().create_future()
        self._calls.append((function, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return future

    async def _run(self) -> None:
        while self._calls or self.engine.has_unfinished:
            self._make_calls()
            if not self.engine.has_unfinished:
                continue
            step = self._thread.submit(self.engine.step)
            try:
                updates = await asyncio.wrap_future(step)
            except Exception as error:
                self._end_all(error)
            except asyncio.CancelledError:
                # Nobody else may have the engine before its step is done.
                concurrent.futures.wait([step])
                self._end_all(RuntimeError("the task of the engine was cancelled"))
                self._make_calls()
                raise
            else:
                for update in updates:
                    self._deliver(update)

    def _end_all(self, error: Exception) -> None:
        for name, queue in self._queues.items():
            queue.put_nowait(error)
            self.engine.cancel(name)
        self._queues.clear()

    def _make_calls(self) -> None:
        calls, self._calls = self._calls, []
        for function, future in calls:
            if future.cancelled():
                continue
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _deliver(self, update: RequestUpdate) -> None:
        queue = self._queues.get(update.request_id)
        if queue is not None:
            queue.put_nowait(update)
        if update.is_last:
            self._queues.pop(update.request_id, None)

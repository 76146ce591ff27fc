"""Requests of many tasks share one engine, and each gets its own tokens."""

import asyncio
import gc

import pytest
import torch

from torch_rpa.serving import (
    AsyncEngine,
    Engine,
    EngineOptions,
    RequestStatus,
    SamplingParams,
)

GREEDY = SamplingParams(max_new_tokens=9)
PROMPTS = [[5], [7] * 11, [1, 2, 3, 4], [9] * 20]


@pytest.fixture
def engine(paged):
    return Engine(
        paged,
        EngineOptions(
            max_num_sequences=3,
            max_tokens_per_step=16,
            max_sequence_length=64,
            page_size=8,
            device="cpu",
        ),
    )


@pytest.fixture
def expected(engine):
    results = engine.generate_batch(PROMPTS, GREEDY)
    return [output.generated_tokens for output in results.values()]


async def tokens_of(server, prompt):
    return [
        token
        async for update in server.generate(prompt, GREEDY)
        for token in update.new_tokens
    ]


def test_tasks_get_their_tokens(engine, expected):
    async def main():
        async with AsyncEngine(engine) as server:
            together = await asyncio.gather(*(tokens_of(server, p) for p in PROMPTS))
            return together, await tokens_of(server, PROMPTS[0])  # after a rest

    together, again = asyncio.run(main())
    assert together == expected and again == expected[0]


def test_leaving_the_loop_cancels_the_request(engine, expected):
    async def main():
        async with AsyncEngine(engine) as server:
            other = asyncio.create_task(tokens_of(server, PROMPTS[1]))
            stream = server.generate([3] * 9, SamplingParams(max_new_tokens=50))
            update = await anext(stream)
            await stream.aclose()
            assert await other == expected[1]
            return update.output

    output = asyncio.run(main())
    assert output.status == RequestStatus.CANCELLED
    assert len(output.generated_tokens) < 49
    assert engine.scheduler.allocator.num_held == 0 and not engine.has_unfinished


def test_a_cancelled_task_cancels_its_request(engine):
    async def main():
        async with AsyncEngine(engine) as server:
            task = asyncio.create_task(tokens_of(server, PROMPTS[0]))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert engine.scheduler.allocator.num_held == 0 and not engine.has_unfinished


def test_cancelling_by_name_ends_the_loop(engine):
    async def main():
        async with AsyncEngine(engine) as server:
            long = SamplingParams(max_new_tokens=50)
            updates = []
            async for update in server.generate([3], long, request_id="long"):
                updates.append(update)
                if len(updates) == 1:
                    assert await server.cancel("long")
            assert not await server.cancel("long")
            return updates

    updates = asyncio.run(main())
    assert updates[-1].is_last
    assert updates[-1].output.status == RequestStatus.CANCELLED


def test_closing_cancels_what_runs(engine):
    async def main():
        server = AsyncEngine(engine)
        task = asyncio.create_task(tokens_of(server, PROMPTS[3]))
        await asyncio.sleep(0.01)
        await server.close()
        return await task

    assert len(asyncio.run(main())) < 9
    assert engine.scheduler.allocator.num_held == 0


def test_malformed_and_failing_requests_tell_their_own_task(engine, expected):
    async def main():
        async with AsyncEngine(engine) as server:
            other = asyncio.create_task(tokens_of(server, PROMPTS[2]))
            with pytest.raises(ValueError, match="at least one token"):
                await tokens_of(server, [])
            too_long = server.generate([1] * 60, GREEDY)
            (update,) = [update async for update in too_long]
            assert update.output.status == RequestStatus.FAILED
            assert update.output.error is not None
            assert "must be at most 64 together" in update.output.error
            assert await other == expected[2]

    asyncio.run(main())


def test_a_request_that_breaks_steps_does_not_poison_later_ones(engine, expected):
    forward = engine._runner.forward

    def broken_by_99(inputs, last_generated=None, **keywords):
        if 99 in inputs.input_ids:
            raise RuntimeError("out of memory")
        return forward(inputs, last_generated, **keywords)

    engine._runner.forward = broken_by_99

    async def main():
        async with AsyncEngine(engine) as server:
            others = asyncio.gather(*(tokens_of(server, p) for p in PROMPTS))
            updates = [update async for update in server.generate([9, 99], GREEDY)]
            assert [update.is_last for update in updates] == [True]
            assert updates[0].output.error == "RuntimeError: out of memory"
            return await others, await tokens_of(server, PROMPTS[0])

    together, later = asyncio.run(main())
    assert together == expected and later == expected[0]


def test_an_error_of_on_step_ends_what_runs_and_nothing_else(engine, expected):
    records = []

    def on_step(record):
        records.append(record)
        if len(records) == 3:
            raise ZeroDivisionError("of on_step")

    engine._on_step = on_step

    async def main():
        async with AsyncEngine(engine) as server:
            errors = await asyncio.gather(
                *(tokens_of(server, p) for p in PROMPTS[:2]), return_exceptions=True
            )
            return errors, await tokens_of(server, PROMPTS[2])

    errors, later = asyncio.run(main())
    assert [str(error) for error in errors] == ["of on_step"] * 2
    assert later == expected[2]
    assert engine.scheduler.allocator.num_held == 0


def test_a_cancelled_task_of_the_engine_ends_what_runs_and_nothing_else(
    engine, expected
):
    async def main():
        async with AsyncEngine(engine) as server:
            waiting = asyncio.create_task(tokens_of(server, PROMPTS[1]))
            while engine.stats.num_steps == before:
                await asyncio.sleep(0)
            assert server._task is not None
            server._task.cancel()
            with pytest.raises(RuntimeError, match="task of the engine was cancelled"):
                await asyncio.wait_for(waiting, 60)
            return await tokens_of(server, PROMPTS[0])

    before = engine.stats.num_steps
    assert asyncio.run(main()) == expected[0]
    assert engine.scheduler.allocator.num_held == 0


def test_an_event_loop_may_end_without_closing(engine, expected, caplog):
    """What runs is cancelled, and the next event loop finds the engine at rest."""
    server = AsyncEngine(engine)

    async def leave_one_running():
        tasks = [asyncio.create_task(tokens_of(server, p)) for p in PROMPTS]
        while engine.stats.num_steps == before:
            await asyncio.sleep(0)
        return tasks

    for _ in range(2):
        before = engine.stats.num_steps
        tasks = asyncio.run(leave_one_running())
        assert all(task.done() for task in tasks)
    assert asyncio.run(tokens_of(server, PROMPTS[1])) == expected[1]
    assert engine.scheduler.allocator.num_held == 0
    gc.collect()
    assert not caplog.records  # such as of a task that is destroyed while pending


def test_a_closed_engine_says_so(engine):
    async def main():
        server = AsyncEngine(engine)
        await server.close()
        with pytest.raises(RuntimeError, match="before close"):
            await tokens_of(server, PROMPTS[0])

    asyncio.run(main())


def test_steps_run_outside_of_the_event_loop(engine):
    threads = set()
    forward = engine._runner.forward

    def logged(inputs, last_generated=None, **keywords):
        import threading

        threads.add(threading.current_thread().name)
        assert not torch.is_grad_enabled()
        return forward(inputs, last_generated, **keywords)

    engine._runner.forward = logged

    async def main():
        async with AsyncEngine(engine) as server:
            await tokens_of(server, PROMPTS[0])

    asyncio.run(main())
    assert threads == {"engine_0"}

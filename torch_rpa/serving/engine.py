"""Continuous batching: requests of any length come and go, each step runs them all."""

from __future__ import annotations

import dataclasses
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel

from torch_rpa import devices
from torch_rpa.scheduling import (
    OutOfPagesError,
    PageAllocator,
    Request,
    Row,
    Scheduler,
)
from torch_rpa.serving import sampling
from torch_rpa.serving.detokenizer import Decoder, Detokenizer
from torch_rpa.serving.options import EngineOptions
from torch_rpa.serving.outputs import GenerationOutput, RequestStatus, RequestUpdate
from torch_rpa.serving.sampling_params import SamplingParams
from torch_rpa.serving.stats import EngineStats, StepRecord
from torch_rpa.transformers.model_runner import ModelRunner
from torch_rpa.transformers.step_inputs import build_step_inputs

Params = SamplingParams | GenerationConfig | None


@dataclasses.dataclass(eq=False)
class _Entry:
    """A request that has not ended: its plan, its wishes and its state."""

    request: Request
    params: SamplingParams
    seed: int
    output: GenerationOutput
    detokenizer: Detokenizer | None


class _Flight(NamedTuple):
    """A step that has been started, and its tokens, which may still be computed."""

    rows: list[Row]
    generated: torch.Tensor  # i64[S], on the device


class Engine:
    """Serves requests with one model.

    Every step computes one token of each running text and as much of new prompts as
    fits its budget, in one ragged batch padded to one of a few static shapes::

        host    plan 1 | start 1 | plan 2 | start 2 | read 1 | plan 3 | start 3 | ...
        device           run 1 ------------ run 2 ---------------- run 3 ---------

    A step is planned, and its tensors are built, while the device runs the one before,
    whose tokens stay on the device and become inputs there. The host waits once in a
    step, for token ids. So it sees the end of a text one step late, and drops the
    surplus token.

    Attributes:
        stats: What the steps so far did.
        scheduler: The waiting and running requests and their pages.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: EngineOptions | None = None,
        *,
        tokenizer: Decoder | None = None,
        on_step: Callable[[StepRecord], object] = lambda record: None,
    ):
        """Moves the model to its device and makes its caches.

        Args:
            model: A causal language model of transformers. It is switched to this
                project's attention.
            options: Limits and cache.
            tokenizer: Needed for stop strings only.
            on_step: Called after each step.
        """
        self.options = options = options or EngineOptions()
        self._config = model.config.get_text_config()
        self._max_sequence_length = options.sequence_length(self._config)
        self._shapes = options.step_shapes(self._max_sequence_length)
        self._shapes.bucket(options.max_tokens_per_step)  # raises if none holds it
        num_pages = options.num_pages
        if num_pages is None:
            num_pages = options.max_num_sequences * self._shapes.pages_per_sequence
        self.scheduler = Scheduler(
            PageAllocator(num_pages),
            page_size=options.page_size,
            max_num_sequences=options.max_num_sequences,
            max_tokens_per_step=options.max_tokens_per_step,
            prefix_caching=options.prefix_caching,
            lookahead=options.lookahead,
        )
        self._generation_config: Any = model.generation_config
        self._device = devices.open_device(options.device or model.device)
        compilations = devices.num_compilations(self._device)
        self._runner = ModelRunner(
            model,
            num_pages=num_pages,
            page_size=options.page_size,
            device=self._device,
            cache_dtype=options.cache_dtype,
        )
        self._greedy_step = self._runner.step(sampling.greedy)
        self._sampling_step = self._runner.step(sampling.sample)
        self._last_generated = torch.zeros(
            options.max_num_sequences, dtype=torch.int64
        ).to(self._device)
        self._tokenizer = tokenizer
        self._on_step = on_step
        self._random = random.Random(options.seed)
        self._entries: dict[Request, _Entry] = {}
        self._entry_of_id: dict[str, _Entry] = {}
        self._flights: deque[_Flight] = deque()
        self._updates: list[RequestUpdate] = []
        self._num_named = 0
        self.stats = EngineStats(max_compilations=self._max_compilations())
        self.stats.num_compilations = self._num_compilations() - compilations

    @property
    def has_unfinished(self) -> bool:
        """Whether further steps have something to do or to report."""
        return bool(self._entries or self._flights or self._updates)

    def add_request(
        self,
        prompt_ids: Sequence[int],
        params: Params = None,
        *,
        request_id: str | None = None,
    ) -> str:
        """Adds a request, which steps from now on compute.

        A request that can never fit the engine fails, as the next step reports.

        Args:
            prompt_ids: Token ids, at least one.
            params: Sampling and stop conditions; a generation config of transformers
                is converted. None is the model's own.
            request_id: A name that no unfinished request has; None makes one.

        Returns:
            The name of the request.

        Raises:
            ValueError: The prompt is empty or holds ids that the model does not know,
                the name is taken, or a stop string is given without a tokenizer.
            NotImplementedError: The generation config asks for something else.
        """
        entry = self._entry(prompt_ids, self._sampling_params(params), request_id)
        self._add(entry)
        return entry.output.request_id

    def cancel(self, request_id: str) -> bool:
        """Ends a request and frees its pages, as the next step reports.

        Returns:
            False if there is no such request, or it has ended.
        """
        entry = self._entry_of_id.get(request_id)
        if entry is None:
            return False
        self._end(entry, RequestStatus.CANCELLED)
        self._updates.append(RequestUpdate(entry.output, [], is_last=True))
        return True

    def step(self) -> list[RequestUpdate]:
        """Starts a step, and returns what the one before it brought.

        Returns:
            An update for each request that got a token or ended; none after the first
            step, whose tokens come with the second.
        """
        start, compilations = time.perf_counter(), self._num_compilations()
        generated = self.stats.num_generated
        rows = self.scheduler.schedule()
        if rows:
            self._flights.append(self._start(rows))
        num_running = 1 if rows and self.options.lookahead else 0
        while len(self._flights) > num_running:
            self._finish(self._flights.popleft())
        self.stats.num_preemptions = self.scheduler.num_preemptions
        seconds = time.perf_counter() - start
        self.stats.seconds += seconds
        if rows:
            num_tokens = sum(row.num_tokens for row in rows)
            record = StepRecord(
                start=start,
                seconds=seconds,
                num_tokens=num_tokens,
                num_padded_tokens=self._shapes.bucket(num_tokens),
                num_sequences=len(rows),
                num_decodes=sum(row.num_tokens == 1 for row in rows),
                num_waiting=len(self.scheduler.waiting),
                num_pages_held=self.scheduler.allocator.num_held,
                num_generated=self.stats.num_generated - generated,
                num_compilations=self._num_compilations() - compilations,
            )
            self.stats.add(record)
            self._on_step(record)
        updates, self._updates = self._updates, []
        return updates

    def stream(self) -> Iterator[RequestUpdate]:
        """Runs steps until every request has ended; yields their updates.

        Requests may be added and cancelled meanwhile.
        """
        while self.has_unfinished:
            yield from self.step()

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        generation_config: Params | Sequence[Params] = None,
        **changes: Any,
    ) -> dict[str, GenerationOutput]:
        """Generates for all prompts, like ``model.generate_batch`` of transformers.

        Requests that were added before run as well; their updates are lost.

        Args:
            inputs: Token ids of each prompt; if one is malformed, none is added.
            generation_config: Sampling and stop conditions, of all or of each.
            changes: Attributes of SamplingParams that are to differ.

        Returns:
            The results by request id, in the order of the inputs.
        """
        if isinstance(generation_config, Sequence):
            configs = list(generation_config)
        else:
            configs = [generation_config] * len(inputs)
        params = [
            dataclasses.replace(self._sampling_params(config), **changes)
            for config in configs
        ]
        entries = [
            self._entry(prompt, wishes, None)
            for prompt, wishes in zip(inputs, params, strict=True)
        ]
        for entry in entries:
            self._add(entry)
        for _ in self.stream():
            pass
        return {entry.output.request_id: entry.output for entry in entries}

    def warm_up(self, *, with_sampling: bool = True) -> None:
        """Compiles all programs now, on steps without sequences.

        Args:
            with_sampling: Also those for steps with requests that are not greedy.

        Raises:
            RuntimeError: There are requests, whose tokens would be lost.
        """
        if self.has_unfinished:
            raise RuntimeError("warm_up must be called before requests are added")
        before = self._num_compilations()
        for size in self._shapes.token_buckets:
            for is_greedy in (True, False) if with_sampling else (True,):
                self._run([], size, is_greedy)
        self._last_generated.cpu()
        self.stats.num_compilations += self._num_compilations() - before

    def _entry(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str | None
    ) -> _Entry:
        """Checks a request that is to be added."""
        if request_id is None:
            request_id = f"req_{self._num_named}"
            self._num_named += 1
        if request_id in self._entry_of_id:
            raise ValueError(f"request_id must be new, got {request_id!r} again")
        request = Request([int(token) for token in prompt_ids], params.max_new_tokens)
        vocabulary = self._config.vocab_size
        if not 0 <= min(request.tokens) <= max(request.tokens) < vocabulary:
            raise ValueError(
                f"prompt_ids must be at least 0 and below {vocabulary}, got "
                f"{min(request.tokens)} to {max(request.tokens)}"
            )
        return _Entry(
            request,
            params,
            self._random.getrandbits(63) if params.seed is None else params.seed,
            GenerationOutput(request_id, request.prompt),
            self._detokenizer(params),
        )

    def _add(self, entry: _Entry) -> None:
        """Hands a request to the scheduler; one that can never fit fails."""
        error = self._too_long(entry.request)
        if error is None:
            try:
                self.scheduler.add(entry.request)
            except OutOfPagesError as out_of_pages:
                error = str(out_of_pages)
        if error is not None:
            entry.output.status, entry.output.error = RequestStatus.FAILED, error
            self._updates.append(RequestUpdate(entry.output, [], is_last=True))
        else:
            self._entries[entry.request] = entry
            self._entry_of_id[entry.output.request_id] = entry

    def _sampling_params(self, params: Params) -> SamplingParams:
        if isinstance(params, SamplingParams):
            return params
        config = self._generation_config if params is None else params
        return SamplingParams.from_generation_config(config)

    def _detokenizer(self, params: SamplingParams) -> Detokenizer | None:
        if not params.stop_strings:
            return None
        if self._tokenizer is None:
            raise ValueError(
                "tokenizer must be given to the engine for stop_strings, got None"
            )
        return Detokenizer(self._tokenizer)

    def _too_long(self, request: Request) -> str | None:
        length = request.num_prompt + request.max_new_tokens
        if length <= self._max_sequence_length:
            return None
        return (
            f"{request.num_prompt} prompt tokens and {request.max_new_tokens} new ones "
            f"must be at most {self._max_sequence_length} together, got {length}: "
            "raise max_sequence_length, or shorten prompt or max_new_tokens"
        )

    def _start(self, rows: list[Row]) -> _Flight:
        """Starts a step on the device, without waiting for it or for the last one."""
        now = time.perf_counter()
        for row in rows:
            output = self._entries[row.request].output
            if output.status == RequestStatus.PENDING:
                output.status = RequestStatus.PREFILLING
                output.lifespan = (now, -1)
                output.num_shared_tokens = row.request.num_shared
            if (
                row.start == row.request.num_shared
            ):  # started, for the first time or not
                self.stats.num_shared_tokens += row.request.num_shared
        is_greedy = all(
            not row.is_last or self._entries[row.request].params.temperature == 0
            for row in rows
        )
        size = self._shapes.bucket(sum(row.num_tokens for row in rows))
        return _Flight(rows, self._run(rows, size, is_greedy))

    def _run(self, rows: list[Row], size: int, is_greedy: bool) -> torch.Tensor:
        inputs = build_step_inputs(rows, self._shapes, size).to(self._device)
        if is_greedy:
            generated = self._greedy_step(inputs, self._last_generated)
        else:
            entries = [self._entries[row.request] for row in rows]
            wishes = sampling.build_sampling_inputs(
                [
                    (entry.params, entry.seed, row.end)
                    for entry, row in zip(entries, rows, strict=True)
                ],
                num_rows=self._shapes.num_sequences,
                vocabulary=self._config.vocab_size,
            )
            generated = self._sampling_step(
                inputs, self._last_generated, wishes.to(self._device)
            )
        self._last_generated = generated
        self._runner.sync()
        return generated

    def _finish(self, flight: _Flight) -> None:
        """Waits for the tokens of a step and gives them to their requests."""
        tokens = flight.generated.cpu().tolist()
        for row, token in zip(flight.rows, tokens, strict=False):
            entry = self._entries.get(row.request)
            if entry is None:
                self.stats.num_surplus += row.is_last
            elif row.is_last:
                self._receive(entry, token)

    def _receive(self, entry: _Entry, token: int) -> None:
        output = entry.output
        entry.request.append(token)
        output.generated_tokens.append(token)
        output.timestamps.append(time.perf_counter())
        output.status = RequestStatus.DECODING
        output.num_preemptions = entry.request.num_preemptions
        output.finish_reason = _finish_reason(entry, token)
        self.stats.num_generated += 1
        if output.finish_reason is not None:
            self._end(entry, RequestStatus.FINISHED)
        self._updates.append(RequestUpdate(output, [token], output.is_finished()))

    def _end(self, entry: _Entry, status: RequestStatus) -> None:
        """Forgets a request that was added to the scheduler."""
        self.scheduler.end(entry.request)
        output = entry.output
        output.status = status
        output.lifespan = (output.lifespan[0], time.perf_counter())
        del self._entries[entry.request]
        del self._entry_of_id[output.request_id]

    def _num_compilations(self) -> int:
        return devices.num_compilations(self._device)

    def _max_compilations(self) -> int:
        """Each bucket with greedy and with sampling rows, and the caches."""
        if not devices.is_compiled(self._device):
            return 0
        return 2 * len(self._shapes.token_buckets) + 1


def _finish_reason(entry: _Entry, token: int) -> str | None:
    params, request = entry.params, entry.request
    if token in params.eos_token_ids:
        return "stop"
    for sequence in params.stop_sequences:
        num_tokens = len(sequence)
        if num_tokens <= request.num_generated and (
            tuple(request.tokens[-num_tokens:]) == sequence
        ):
            return "stop"
    if entry.detokenizer is not None:
        piece = entry.detokenizer.add(token)
        for string in params.stop_strings:
            # Earlier tokens alone do not hold it, or the text would have ended.
            if string in entry.detokenizer.text[-len(string) - len(piece) :]:
                return "stop"
    if request.num_generated >= request.max_new_tokens:
        return "length"
    return None

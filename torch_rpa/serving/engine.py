"""Continuous batching: requests of any length come and go, each step runs them all."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel

from torch_rpa import devices
from torch_rpa.scheduling import (
    OutOfPagesError,
    PageAllocator,
    Request,
    Row,
    Scheduler,
)
from torch_rpa.serving.entries import Entry
from torch_rpa.serving.finite import NO_TOKEN, NONE_LEFT
from torch_rpa.serving.intake import Intake, Params
from torch_rpa.serving.metrics import PrometheusMetrics
from torch_rpa.serving.model_version import ModelVersion
from torch_rpa.serving.options import EngineOptions
from torch_rpa.serving.outputs import (
    GenerationOutput,
    RequestStatus,
    RequestUpdate,
    name_of_text,
)
from torch_rpa.serving.stats import EngineStats, StepRecord
from torch_rpa.serving.step_runner import Flight, StepRunner
from torch_rpa.serving.trials import Trials
from torch_rpa.transformers.model_runner import ModelRunner
from torch_rpa.transformers.windows import widest_window
from torch_rpa.transformers.wrappers import refuse_adapters_of_texts

_logger = logging.getLogger(__name__)


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

    A step that raises is rolled back, whatever the cause: its requests lose their pages
    and are computed again, as after a preemption. They then run in smaller groups, and
    one that fails alone ends as ``FAILED``, with the error; see ``Trials``.

    Attributes:
        stats: What the steps so far did.
        scheduler: The waiting and running requests and their pages.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: EngineOptions | None = None,
        *,
        tokenizer: Any = None,
        on_step: Callable[[StepRecord], object] = lambda record: None,
        metrics: PrometheusMetrics | None = None,
    ):
        """Moves the model to its device and makes its caches.

        Args:
            model: A causal language model of transformers. It is switched to this
                project's attention.
            options: Limits and cache.
            tokenizer: Needed for prompts that are texts, for texts of outputs, and for
                what parameters say as text.
            on_step: Called after each step.
            metrics: Told what each step brought, such as ``PrometheusMetrics``.

        Raises:
            ValueError: One of them is something else, or options do not fit the model.
        """
        options = EngineOptions() if options is None else options
        if not isinstance(options, EngineOptions):
            raise ValueError(f"options must be EngineOptions or None, got {options!r}")
        _require_parts(model, on_step, tokenizer, metrics)
        self.options = options
        config = model.config.get_text_config()
        longest = options.sequence_length(config)
        self._device = devices.open_device(options.device or model.device)
        self._shapes = options.step_shapes(
            longest, compiled=devices.is_compiled(self._device)
        )
        num_pages = options.num_pages
        if num_pages is None:
            num_pages = options.max_num_sequences * self._shapes.pages_per_sequence
        window = widest_window(config)
        self.scheduler = Scheduler(
            PageAllocator(num_pages),
            page_size=options.page_size,
            max_num_sequences=options.max_num_sequences,
            max_tokens_per_step=options.max_tokens_per_step,
            prefix_caching=options.prefix_caching,
            lookahead=options.lookahead,
            window=window,
        )
        compilations = devices.num_compilations(self._device)
        self._runner = ModelRunner(
            model,
            num_pages=num_pages,
            page_size=options.page_size,
            device=self._device,
            cache_dtype=options.cache_dtype,
            k_scale=options.k_scale,
            v_scale=options.v_scale,
            window=window,
        )
        self._model_version = ModelVersion(self._runner.model)
        self.scheduler.model_key = self._model_version.key()
        self._must_restart = False
        self._decode = _token_decoder(tokenizer)
        self._intake = Intake(
            tokenizer,
            model.generation_config,
            vocabulary=config.vocab_size,
            longest=longest,
            seed=options.seed,
        )
        self._on_step = on_step
        self._metrics = metrics
        self._entries: dict[Request, Entry] = {}
        self._entry_of_id: dict[str, Entry] = {}
        self._steps = StepRunner(
            self._runner,
            self._shapes,
            self._entries,
            vocabulary=config.vocab_size,
            longest=longest,
        )
        self._flights: deque[Flight] = deque()
        self._trials = Trials()
        # What is to be reported, and how many tokens of it have been.
        self._changed: dict[GenerationOutput, int] = {}
        self._num_named = 0
        self.stats = EngineStats(max_compilations=self._steps.max_compilations)
        self.stats.num_compilations = self._num_compilations() - compilations

    @property
    def has_unfinished(self) -> bool:
        """Whether further steps have something to do or to report."""
        return bool(self._entries or self._flights or self._changed)

    def add_request(
        self,
        prompt_ids: Any,
        params: Params = None,
        *,
        request_id: str | None = None,
    ) -> str:
        """Adds a request, which steps from now on compute.

        A request that can never fit the engine fails, as the next step reports. With
        ``n`` texts, each is a request, named by ``outputs.name_of_text``.

        Args:
            prompt_ids: Token ids, at least one, or anything else that
                ``serving.prompts`` reads, such as a text.
            params: Sampling and stop conditions, or a dict of them; a generation config
                of transformers is converted. None is the model's own.
            request_id: A name that no unfinished request has; None makes one.

        Returns:
            The name of the request.

        Raises:
            ValueError: The prompt is none, is empty or holds ids that the model does
                not know, the name is taken, or something is given as text without a
                tokenizer.
            NotImplementedError: The generation config asks for something else, or the
                prompt has images.
        """
        return self.add_texts(prompt_ids, params, request_id=request_id)[0]

    def add_texts(
        self,
        prompt_ids: Any,
        params: Params = None,
        *,
        request_id: str | None = None,
    ) -> list[str]:
        """Adds a request like ``add_request``; returns the names of its ``n`` texts."""
        tokens = self._intake.prompt(prompt_ids, "prompt_ids")
        wishes = self._intake.params(params, len(tokens))
        names = self._new_names(request_id, wishes.n)
        entries = self._intake.entries(tokens, wishes, names)
        for entry in entries:
            self._add(entry)
        return [entry.output.request_id for entry in entries]

    def cancel(self, request_id: str) -> bool:
        """Ends a request and frees its pages, as the next step reports.

        Args:
            request_id: Of a text, or of the first one of a request, which means all.

        Returns:
            False if there is no such request, or it has ended.
        """
        entries = [
            entry
            for name, entry in self._entry_of_id.items()
            if name in (request_id, name_of_text(request_id, entry.output.index))
        ]
        for entry in entries:
            self._end(entry, RequestStatus.CANCELLED)
        return bool(entries)

    def step(self) -> list[RequestUpdate]:
        """Starts a step, and returns what the one before it brought.

        It raises nothing but what ``on_step`` raises and ``KeyboardInterrupt``, and can
        be called again after either: no token and no request is lost.

        Returns:
            An update for each request that got a token or ended; none after the first
            step, whose tokens come with the second.
        """
        start, compilations = time.perf_counter(), self._num_compilations()
        generated = self.stats.num_generated
        rows = self._attempt_step()
        self.stats.num_preemptions = self.scheduler.num_preemptions
        self.stats.max_compilations = self._steps.max_compilations
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
            if self._metrics:
                self._metrics.observe_step(record, self.stats)
            self._on_step(record)
        changed, self._changed = self._changed, {}
        updates = [
            RequestUpdate(o, o.generated_tokens[num_reported:], o.is_finished())
            for o, num_reported in changed.items()
        ]
        if self._metrics:
            self._observe(self._metrics, updates)
        return updates

    def _observe(
        self, metrics: PrometheusMetrics, updates: Sequence[RequestUpdate]
    ) -> None:
        allocator = self.scheduler.allocator
        metrics.observe_load(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            cache_usage=allocator.num_held / allocator.num_pages,
        )
        for update in updates:
            metrics.observe_update(update)

    def stream(self) -> Iterator[RequestUpdate]:
        """Runs steps until every request has ended; yields their updates.

        Requests may be added and cancelled meanwhile.
        """
        while self.has_unfinished:
            yield from self.step()

    def generate_batch(
        self,
        inputs: Any,
        generation_config: Params | Sequence[Params] = None,
        **changes: Any,
    ) -> dict[str, GenerationOutput]:
        """Generates for all prompts, like ``model.generate_batch`` of transformers.

        Requests that were added before run as well; their updates are lost.

        Args:
            inputs: A list of prompts, each as in ``add_request``, or what a tokenizer
                returned for several. If one is malformed, none is added.
            generation_config: Sampling and stop conditions, of all or of each.
            changes: Attributes of SamplingParams that are to differ.

        Returns:
            The results by request id, in the order of the inputs; the ``n`` texts of a
            prompt follow each other.

        Raises:
            ValueError: As in ``add_request``; or the lists are of unequal lengths.
            NotImplementedError: As in ``add_request``.
        """
        prompts = self._intake.prompts(inputs, "inputs")
        configs: list[Any] = [generation_config] * len(prompts)
        if isinstance(generation_config, (list, tuple)):
            configs = list(generation_config)
        if len(configs) != len(prompts):
            raise ValueError(
                f"generation_config must be one for all or for each of {len(prompts)} "
                f"prompts, got {len(configs)}"
            )
        params = [
            self._intake.params(config, len(prompt), **changes)
            for config, prompt in zip(configs, prompts, strict=True)
        ]
        entries = [
            entry
            for prompt, wishes in zip(prompts, params, strict=True)
            for entry in self._intake.entries(
                prompt, wishes, self._new_names(None, wishes.n)
            )
        ]
        for entry in entries:
            self._add(entry)
        for _ in self.stream():
            pass
        return {entry.output.request_id: entry.output for entry in entries}

    def reset_prefix_cache(self) -> None:
        """Forgets all prefixes; what runs is computed again from its tokens.

        Weights that were changed in place, and adapters that were switched, are noticed
        without it. It is for changes that cannot be seen: writes through
        ``weight.data``, or to what is no weight.
        """
        self._must_restart = True

    def warm_up(
        self,
        *,
        with_sampling: bool = True,
        with_logits: bool = False,
        with_prompt_logprobs: bool = False,
    ) -> None:
        """Compiles programs now, on steps without sequences.

        Args:
            with_sampling: Also those for steps with requests that are not greedy.
            with_logits: Also those for requests that change their logits, by penalties,
                biases, bans or grammars, or report log probabilities.
            with_prompt_logprobs: Also those for log probabilities of prompts.

        Raises:
            RuntimeError: There are requests, whose tokens would be lost.
        """
        if self.has_unfinished:
            raise RuntimeError("warm_up must be called before requests are added")
        before = self._num_compilations()
        self._steps.warm_up(
            with_sampling=with_sampling,
            with_logits=with_logits,
            with_prompt_logprobs=with_prompt_logprobs,
        )
        self.stats.max_compilations = self._steps.max_compilations
        self.stats.num_compilations += self._num_compilations() - before

    def _add(self, entry: Entry) -> None:
        """Hands a request to the scheduler; one that can never fit fails."""
        error = self._intake.too_long(entry.request)
        if error is None:
            try:
                self.scheduler.add(entry.request)
            except OutOfPagesError as out_of_pages:
                error = str(out_of_pages)
        if error is not None:
            self._fail(entry, error)
        else:
            self._entries[entry.request] = entry
            self._entry_of_id[entry.output.request_id] = entry

    def _new_names(self, request_id: str | None, n: int) -> list[str]:
        """Returns the names of the texts of a request; none of them may be taken."""
        if request_id is None:
            request_id = self._new_name()
        if not isinstance(request_id, str):
            raise ValueError(f"request_id must be a str or None, got {request_id!r}")
        names = [name_of_text(request_id, index) for index in range(n)]
        for name in names:
            if name in self._entry_of_id:
                raise ValueError(f"request_id must be new, got {name!r} again")
        return names

    def _new_name(self) -> str:
        while (name := f"req_{self._num_named}") in self._entry_of_id:
            self._num_named += 1  # somebody's own
        self._num_named += 1
        return name

    def _attempt_step(self) -> list[Row]:
        """Starts a step and reads the one before; returns the rows that were started.

        The plan of the scheduler is that the step will run: if it does not, the plan is
        void, and so are those that were made upon it.
        """
        try:
            return self._advance()
        except Exception as error:
            _logger.warning("a step failed and is rolled back", exc_info=True)
            description = _describe(error)
        except BaseException:
            self._roll_back()
            raise
        # The error is gone by now, and with it all that its traceback kept alive.
        self._recover(description)
        return []

    def _advance(self) -> list[Row]:
        self._follow_model()
        while self._trials.is_through(self._entries):
            self._finish_all_but(0)
            if self._trials.go_on():
                self.scheduler.restart(self._entries)
        num_before = len(self._flights)
        flight = Flight()
        self._flights.append(flight)
        flight.rows = self.scheduler.schedule(self._trials.group)
        if flight.rows:
            self._steps.prepare()
            self._start(flight)
            if flight.logits is not None:
                # What is wanted of the logits may depend on the tokens before.
                self._finish_all_but(1)
                if flight not in self._flights:  # all is rolled back
                    return flight.rows
                self._steps.choose(flight)
        else:
            if self._entries and not (num_before or self._changed):
                raise RuntimeError(f"none of {len(self._entries)} requests can go on")
            self._flights.pop()
        self._finish_all_but(1 if flight.rows and self.options.lookahead else 0)
        return flight.rows

    def _follow_model(self) -> None:
        """Has all requests computed again if pages are those of another model."""
        key = self._model_key()
        if key != self.scheduler.model_key:
            self._finish_all_but(0)
            self.scheduler.change_model(key)
        if self._must_restart:
            self._finish_all_but(0)
            self.scheduler.restart(self._entries)
            self._must_restart = False

    def _model_key(self) -> bytes:
        """Returns what stands for the model; an error is that of the step to come."""
        try:
            key = self._model_version.key()
            if key != self.scheduler.model_key:
                refuse_adapters_of_texts(self._runner.model)
        # Of the model's own code, and so of any type. It is not swallowed: an empty
        # step makes it the error of the step that was to be planned.
        except Exception:
            self._flights.append(Flight())
            raise
        return key

    def _recover(self, error: str) -> None:
        """Makes the engine whole after a step that raised."""
        self.stats.num_failed_steps += 1
        failed = self._first_failed()
        if failed is not None:
            suspects = [row.request for row in failed.rows]
            if not suspects:  # planning failed, for those that can be in a step now
                suspects = self._trials.requests or list(self._entries)
                suspects = suspects[: self.options.max_num_sequences]
            unfinished = [request for request in suspects if request in self._entries]
            if unfinished and len(suspects) == 1:
                self._fail(self._entries[unfinished[0]], error)
            else:
                self._trials.split(unfinished)
        self._roll_back()

    def _first_failed(self) -> Flight | None:
        """Reads the steps that did run; returns the first one that did not."""
        while self._flights:
            flight = self._flights[0]
            if flight.generated is None:
                return flight
            try:
                self._finish(flight)
            # Of any type, since frameworks raise their own. It is that of the step that
            # is recovered from, met again as its tokens are read, or one that hid
            # behind it: the requests of the step that is returned fail with it, or are
            # tried again one by one.
            except Exception:
                return flight
        return None

    def _roll_back(self) -> None:
        """Forgets all plans and pages: every request is computed again."""
        self._flights.clear()
        self.scheduler.restart(self._entries)
        self._steps.lose()

    def _start(self, flight: Flight) -> None:
        """Starts a step on the device, without waiting for it or for the last one."""
        now = time.perf_counter()
        for row in flight.rows:
            output = self._entries[row.request].output
            if output.status == RequestStatus.PENDING:
                output.status = RequestStatus.PREFILLING
                output.lifespan = (now, -1)
                output.num_shared_tokens = row.request.num_shared
            # Then it is started, for the first time or not.
            if row.start == row.request.num_shared:
                self.stats.num_shared_tokens += row.request.num_shared
        self._steps.start(flight)

    def _finish_all_but(self, num_running: int) -> None:
        while len(self._flights) > num_running:
            self._finish(self._flights[0])

    def _finish(self, flight: Flight) -> None:
        """Waits for the tokens of the oldest step and gives them to their requests.

        Once they are on the host, an error is that of the request whose token it is.
        """
        assert flight.generated is not None
        tokens = flight.generated.cpu().tolist()
        logprobs = flight.logprobs and flight.logprobs.cpu()
        prompt_logprobs = flight.prompt_logprobs and flight.prompt_logprobs.cpu()
        self._flights.popleft()
        is_whole, first = True, 0
        for index, (row, token) in enumerate(zip(flight.rows, tokens, strict=False)):
            entry = self._entries.get(row.request)
            if entry is None:
                self.stats.num_surplus += row.is_last
            else:
                try:
                    if prompt_logprobs is not None:
                        entry.receive_prompt_logprobs(
                            prompt_logprobs, first, row, self._decode
                        )
                    if row.is_last and token == NO_TOKEN:
                        self._refuse_logits(entry, row)
                    elif row.is_last and token == NONE_LEFT:
                        self._refuse_wishes(entry)
                    elif row.is_last:
                        if logprobs is not None:
                            entry.receive_logprobs(logprobs, index, token, self._decode)
                        self._receive(entry, token)
                except Exception as error:
                    _logger.warning("a request failed", exc_info=True)
                    if row.request in self._entries:
                        self._fail(entry, _describe(error))
                    is_whole = False
            first += row.num_tokens
        if not is_whole:
            self._roll_back()

    def _receive(self, entry: Entry, token: int) -> None:
        self._report(entry.output)
        entry.receive(token)
        self.stats.num_generated += 1
        if entry.output.finish_reason is not None:
            self._end(entry, RequestStatus.FINISHED)

    def _refuse_logits(self, entry: Entry, row: Row) -> None:
        self.scheduler.end(entry.request, is_sound=False)
        self._fail(
            entry,
            f"logits must be finite, got NaN or infinity after {row.end} tokens: look "
            "for them in the weights, or take a dtype of a larger range",
        )

    def _refuse_wishes(self, entry: Entry) -> None:
        self.scheduler.end(entry.request)
        self._fail(
            entry,
            "bad_words, min_tokens, penalties, logit_bias and structured_outputs must "
            "leave a token with a finite logit, got none after "
            f"{entry.request.num_generated} new tokens",
        )

    def _report(self, output: GenerationOutput) -> None:
        """Has the step report the tokens from here on, or the end."""
        self._changed.setdefault(output, len(output.generated_tokens))

    def _fail(self, entry: Entry, error: str) -> None:
        """Ends a request that the scheduler has never seen, or is about to forget."""
        entry.output.error = error
        self._forget(entry, RequestStatus.FAILED)

    def _end(self, entry: Entry, status: RequestStatus) -> None:
        """Ends a request that was added to the scheduler, and frees its pages."""
        self.scheduler.end(entry.request)
        self._forget(entry, status)

    def _forget(self, entry: Entry, status: RequestStatus) -> None:
        output = entry.output
        self._report(output)
        output.status = status
        if output.output_text is not None:
            output.output_text.finish()
        output.lifespan = (output.lifespan[0], time.perf_counter())
        self._entries.pop(entry.request, None)
        self._entry_of_id.pop(output.request_id, None)

    def _num_compilations(self) -> int:
        return devices.num_compilations(self._device)


def _token_decoder(tokenizer: Any) -> Callable[[int], str] | None:
    """Returns what gives the text of a single token; None without a tokenizer."""
    if tokenizer is None:
        return None
    return lambda token: tokenizer.decode([token], skip_special_tokens=False)


def _require_parts(model: Any, on_step: Any, tokenizer: Any, metrics: Any) -> None:
    """Raises for what an engine would stumble over only later."""
    for name, value, attribute, expected in (
        ("model", model, "generation_config", "a causal language model"),
        ("on_step", on_step, "__call__", "a function"),
        ("tokenizer", tokenizer, "decode", "a tokenizer or None"),
        ("metrics", metrics, "observe_step", "PrometheusMetrics or None"),
    ):
        is_left_out = value is None and expected.endswith("None")
        if not is_left_out and not hasattr(value, attribute):
            raise ValueError(f"{name} must be {expected}, got {type(value).__name__}")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

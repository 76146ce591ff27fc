"""Requests for an engine and when they arrive: prompts, and traces of a server."""

from __future__ import annotations

import dataclasses
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch_rpa.generate.trace import Trace, TraceLine, read_lines
from torch_rpa.serving import Engine, RequestUpdate, SamplingParams


class Encoder(Protocol):
    """What is needed of a tokenizer; those of transformers fit."""

    def encode(self, text: str) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class TimedRequest:
    """A request and its time.

    Attributes:
        name: What it is called in the output.
        prompt_ids: Token ids.
        params: Sampling and stop conditions.
        arrival: Seconds after the start, or steps.
    """

    name: str
    prompt_ids: list[int]
    params: SamplingParams
    arrival: float = 0.0


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests in the order in which they arrive.

    Attributes:
        requests: The requests.
        in_steps: Whether they arrive after a number of steps, not of seconds.
    """

    requests: list[TimedRequest]
    in_steps: bool = False

    @property
    def num_texts(self) -> int:
        """Texts that come of the requests, ``n`` of each."""
        return sum(request.params.n for request in self.requests)


def read_trace(path: Path, params: SamplingParams) -> Trace:
    """Reads a trace, before there is a model.

    Args:
        path: In the format of ``torch_rpa.generate.trace.TRACE_FORMAT``.
        params: For what a line does not say.

    Raises:
        ValueError: Lines are not in the format; the message names them all.
    """
    return read_lines(path, lambda changes: dataclasses.replace(params, **changes))


def trace_workload(
    trace: Trace, tokenizer: Encoder, params: SamplingParams, vocabulary: int
) -> Workload:
    """Returns the requests of a trace.

    Args:
        trace: Of the same parameters.
        tokenizer: For prompts that are text.
        params: For what a line does not say.
        vocabulary: Random tokens are below it.
    """
    requests = [
        TimedRequest(
            f"line {line.number}",
            _prompt_ids(line.fields, tokenizer, vocabulary, seed=line.number),
            _params(line, params),
            line.arrival,
        )
        for line in trace.lines
    ]
    requests.sort(key=lambda request: request.arrival)
    return Workload(requests, in_steps=trace.in_steps)


def replay(
    engine: Engine, workload: Workload, on_add: Callable[[str, TimedRequest], object]
) -> Iterator[RequestUpdate]:
    """Adds each request when its time has come; yields the updates of all steps.

    Args:
        engine: Runs the requests.
        workload: Requests and times.
        on_add: Called with the id of each text of a request that was added.
    """
    coming = deque(workload.requests)
    start, num_steps = time.perf_counter(), 0
    while coming or engine.has_unfinished:
        if workload.in_steps:
            now = float(num_steps)
            if coming and not engine.has_unfinished:  # nothing else passes the time
                now = num_steps = max(num_steps, int(-(-coming[0].arrival // 1)))
        else:
            now = time.perf_counter() - start
        while coming and coming[0].arrival <= now:
            request = coming.popleft()
            for name in engine.add_texts(request.prompt_ids, request.params):
                on_add(name, request)
        if engine.has_unfinished:
            yield from engine.step()
            num_steps += 1
        elif not workload.in_steps:
            time.sleep(max(0.0, coming[0].arrival - (time.perf_counter() - start)))


def _prompt_ids(
    fields: dict[str, Any], tokenizer: Encoder, vocabulary: int, seed: int
) -> list[int]:
    if "prompt" in fields:
        return tokenizer.encode(fields["prompt"])
    num_tokens = fields["prompt_tokens"]
    num_shared = fields.get("prefix_tokens", 0)
    shared = _random_tokens(f"prefix {fields.get('prefix')}", num_shared, vocabulary)
    own = _random_tokens(f"line {seed}", num_tokens - num_shared, vocabulary)
    return shared + own


def _random_tokens(seed: str, count: int, vocabulary: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(vocabulary) for _ in range(count)]


def _params(line: TraceLine, defaults: SamplingParams) -> SamplingParams:
    changes = line.changes
    if "prompt_tokens" in line.fields:
        changes.update(eos_token_ids=(), stop_strings=(), structured_outputs=None)
    return dataclasses.replace(defaults, **changes)


def prompts_workload(
    texts: Sequence[str], tokenizer: Encoder, params: SamplingParams
) -> Workload:
    """Returns one request for each text, all at the start."""
    return Workload([TimedRequest(t, tokenizer.encode(t), params) for t in texts])

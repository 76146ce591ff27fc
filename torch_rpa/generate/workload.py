"""Requests for an engine and when they arrive: prompts, and traces of a server."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch_rpa.serving import Engine, RequestUpdate, SamplingParams

TRACE_FORMAT = """\
A trace has one JSON object on each line:

  arrival        seconds after the start (0 without it), or
  arrival_step   steps after the start: all lines must use the same of the two
  prompt         text, or
  prompt_tokens  number of random tokens; then the text does not end early
  prefix         with prompt_tokens: a name. Requests with the same name begin with the
  prefix_tokens  same tokens, so many of them
  max_new_tokens, temperature, top_k, top_p, seed
                 without them the options of the command line

  {"arrival": 0.0, "prompt": "Once", "max_new_tokens": 20}
  {"arrival": 0.4, "prompt_tokens": 300, "prefix": "a", "prefix_tokens": 200}
"""

_PROMPT_FIELDS = {"prompt", "prompt_tokens", "prefix", "prefix_tokens"}
_PARAMS_FIELDS = {"max_new_tokens", "temperature", "top_k", "top_p", "seed"}
_FIELDS = {"arrival", "arrival_step"} | _PROMPT_FIELDS | _PARAMS_FIELDS


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


def read_trace(
    path: Path, tokenizer: Encoder, params: SamplingParams, vocabulary: int
) -> Workload:
    """Reads a trace in the format of ``TRACE_FORMAT``.

    Args:
        path: One JSON object on each line.
        tokenizer: For prompts that are text.
        params: For what a line does not say.
        vocabulary: Random tokens are below it.

    Raises:
        ValueError: A line is not in the format; the message names it.
    """
    requests, units = [], set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = _fields(line)
            units.add("arrival_step" in fields)
            if len(units) > 1:
                raise ValueError("all lines must have arrival, or all arrival_step")
            requests.append(
                TimedRequest(
                    f"line {number}",
                    _prompt_ids(fields, tokenizer, vocabulary, seed=number),
                    _params(fields, params),
                    float(fields.get("arrival_step", fields.get("arrival", 0))),
                )
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not requests:
        raise ValueError(f"{path} must hold at least one request, got none")
    requests.sort(key=lambda request: request.arrival)
    return Workload(requests, in_steps=True in units)


def replay(
    engine: Engine, workload: Workload, on_add: Callable[[str, TimedRequest], object]
) -> Iterator[RequestUpdate]:
    """Adds each request when its time has come; yields the updates of all steps.

    Args:
        engine: Runs the requests.
        workload: Requests and times.
        on_add: Called with the id of each request that was added.
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
            on_add(engine.add_request(request.prompt_ids, request.params), request)
        if engine.has_unfinished:
            yield from engine.step()
            num_steps += 1
        elif not workload.in_steps:
            time.sleep(max(0.0, coming[0].arrival - (time.perf_counter() - start)))


def _fields(line: str) -> dict[str, Any]:
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError(f"must be a JSON object, got {line.strip()}")
    unknown = sorted(fields.keys() - _FIELDS)
    if unknown:
        raise ValueError(f"fields must be among {sorted(_FIELDS)}, got {unknown}")
    if ("prompt" in fields) == ("prompt_tokens" in fields):
        raise ValueError("must have either prompt or prompt_tokens")
    for name in ("arrival", "arrival_step"):
        if not fields.get(name, 0) >= 0:
            raise ValueError(f"{name} must not be negative, got {fields[name]}")
    return fields


def _prompt_ids(
    fields: dict[str, Any], tokenizer: Encoder, vocabulary: int, seed: int
) -> list[int]:
    if "prompt" in fields:
        return tokenizer.encode(fields["prompt"])
    num_tokens = fields["prompt_tokens"]
    num_shared = fields.get("prefix_tokens", 0)
    if not 0 <= num_shared <= num_tokens:
        raise ValueError(
            f"prefix_tokens must be at most prompt_tokens {num_tokens}, got "
            f"{num_shared}"
        )
    shared = _random_tokens(f"prefix {fields.get('prefix')}", num_shared, vocabulary)
    own = _random_tokens(f"line {seed}", num_tokens - num_shared, vocabulary)
    return shared + own


def _random_tokens(seed: str, count: int, vocabulary: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(vocabulary) for _ in range(count)]


def _params(fields: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    changes = {name: fields[name] for name in _PARAMS_FIELDS & fields.keys()}
    if "prompt_tokens" in fields:
        changes.update(eos_token_ids=(), stop_strings=())
    return dataclasses.replace(defaults, **changes)


def prompts_workload(
    texts: Sequence[str], tokenizer: Encoder, params: SamplingParams
) -> Workload:
    """Returns one request for each text, all at the start."""
    return Workload([TimedRequest(t, tokenizer.encode(t), params) for t in texts])

"""Traces of a server: which requests came when, and which lines say so wrongly."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TRACE_FORMAT = """\
A trace has one JSON object on each line:

  arrival        seconds after the start (0 without it), or
  arrival_step   steps after the start: all lines must use the same of the two
  prompt         text, or
  prompt_tokens  number of random tokens; then the text does not end early
  prefix         with prompt_tokens: a name. Requests with the same name begin with the
  prefix_tokens  same tokens, so many of them
  max_new_tokens, temperature, top_k, top_p, min_p, seed, repetition_penalty,
  presence_penalty, frequency_penalty
                 without them the options of the command line

  {"arrival": 0.0, "prompt": "Once", "max_new_tokens": 20}
  {"arrival": 0.4, "prompt_tokens": 300, "prefix": "a", "prefix_tokens": 200}
"""
PARAMS_FIELDS = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
_MOST_TOKENS = 2**24  # more than any model has positions for


class _Rule(NamedTuple):
    is_valid: Callable[[Any], bool]
    expected: str


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_time(value: Any) -> bool:
    return _is_number(value) and 0 <= value < math.inf


def _is_count(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= _MOST_TOKENS


_RULES = {
    "arrival": _Rule(_is_time, "a number, 0 or more"),
    "arrival_step": _Rule(_is_time, "a number, 0 or more"),
    "prompt": _Rule(lambda value: isinstance(value, str) and value != "", "a text"),
    "prompt_tokens": _Rule(_is_count(1), f"an int from 1 to {_MOST_TOKENS}"),
    "prefix": _Rule(lambda value: isinstance(value, str), "a name"),
    "prefix_tokens": _Rule(_is_count(0), f"an int from 0 to {_MOST_TOKENS}"),
}


@dataclasses.dataclass(frozen=True)
class TraceLine:
    """A line of a trace.

    Attributes:
        number: From 1.
        fields: As they stand there, of the right types.
    """

    number: int
    fields: dict[str, Any]

    @property
    def arrival(self) -> float:
        """Seconds or steps after the start."""
        return float(self.fields.get("arrival_step", self.fields.get("arrival", 0)))

    @property
    def changes(self) -> dict[str, Any]:
        """What the line says of sampling and the end of the text."""
        return {
            name: self.fields[name] for name in PARAMS_FIELDS if name in self.fields
        }


@dataclasses.dataclass(frozen=True)
class Trace:
    """Lines in the order of the file.

    Attributes:
        lines: At least one.
        in_steps: Whether arrivals are numbers of steps, not of seconds.
    """

    lines: list[TraceLine]
    in_steps: bool


def read_lines(path: Path, check_params: Callable[[dict[str, Any]], object]) -> Trace:
    """Reads a trace in the format of ``TRACE_FORMAT``.

    Args:
        path: One JSON object on each line.
        check_params: Called with the fields of ``PARAMS_FIELDS`` that a line has;
            raises a ValueError for one that cannot be.

    Raises:
        ValueError: Lines are not in the format; the message has a line for each of
            them, with its number and the field.
    """
    lines: list[TraceLine] = []
    problems: list[str] = []
    # Only these bytes end a line: a text may hold other separators.
    for number, data in enumerate(path.read_bytes().split(b"\n"), 1):
        if not data.strip():
            continue
        try:
            line = TraceLine(number, _fields(data))
            check_params(line.changes)
            if lines and _is_in_steps(line) != _is_in_steps(lines[0]):
                raise ValueError(
                    "all lines must have arrival, or all arrival_step, as line "
                    f"{lines[0].number}"
                )
            lines.append(line)
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    if not lines:
        raise ValueError(f"{path} must hold at least one request, got none")
    return Trace(lines, _is_in_steps(lines[0]))


def _is_in_steps(line: TraceLine) -> bool:
    return "arrival_step" in line.fields


def _fields(data: bytes) -> dict[str, Any]:
    fields = json.loads(data.decode("utf-8-sig"))
    if not isinstance(fields, dict):
        raise ValueError(f"must be a JSON object, got {fields!r}")
    known = {*_RULES, *PARAMS_FIELDS}
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise ValueError(f"fields must be among {sorted(known)}, got {unknown}")
    if ("prompt" in fields) == ("prompt_tokens" in fields):
        raise ValueError("must have either prompt or prompt_tokens")
    if {"arrival", "arrival_step"} <= fields.keys():
        raise ValueError("must have arrival or arrival_step, got both")
    for name, rule in _RULES.items():
        if name in fields and not rule.is_valid(fields[name]):
            raise ValueError(f"{name} must be {rule.expected}, got {fields[name]!r}")
    for name in ("prefix", "prefix_tokens"):
        if name in fields and "prompt" in fields:
            raise ValueError(f"{name} must be left out beside prompt")
    most = fields.get("prompt_tokens", 0)
    if fields.get("prefix_tokens", 0) > most:
        raise ValueError(
            f"prefix_tokens must be at most prompt_tokens {most}, got "
            f"{fields['prefix_tokens']}"
        )
    return fields

"""Types of the fields of a dataclass, by their annotations."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

LARGEST_INT = 2**31 - 1  # of the int32 tensors that a step is described by


class _Kind(NamedTuple):
    expected: str
    is_valid: Callable[[Any], bool]


def _is_not_bool(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind) and not isinstance(value, bool)


_KINDS = {
    "int": _Kind("an int", _is_not_bool(numbers.Integral)),
    "float": _Kind("a number", _is_not_bool(numbers.Real)),
    "bool": _Kind("True or False", lambda value: isinstance(value, bool)),
    "str": _Kind("a str", lambda value: isinstance(value, str)),
}


def check_types(instance: Any) -> None:
    """Raises a ValueError for a field that is not what its annotation says.

    Only fields that are annotated as ``int``, ``float``, ``bool``, ``str``, or one of
    these ``| None``, are looked at. An int will do for a float, a bool not for an int.
    """
    for field in dataclasses.fields(instance):
        name, _, alternative = str(field.type).partition(" | ")
        kind, value = _KINDS.get(name), getattr(instance, field.name)
        if kind is None or (value is None and alternative == "None"):
            continue
        if not kind.is_valid(value):
            expected = f"{kind.expected} or None" if alternative else kind.expected
            raise ValueError(f"{field.name} must be {expected}, got {value!r}")

"""Arithmetic on scalars that are plain ints or traced ones.

Cells and steps are described by the same code in the kernel and in tests. With Python
ints and bools these functions are plain Python, at once and with Python results. If
one argument is traced, they are the functions of jax.numpy of the same names.
"""

from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import lax

# A Python int in tests, a traced int32 scalar in the kernel. No type checker knows of
# a type that is both.
Int: TypeAlias = Any
# Likewise a Python bool or a traced one. ``&`` and ``|`` serve both, ``~`` and ``not``
# do not.
Bool: TypeAlias = Any


def where(condition: Bool, if_true: Int, if_false: Int) -> Int:
    """One of two numbers. A condition that is known chooses without any code."""
    if isinstance(condition, bool):
        return if_true if condition else if_false
    return jnp.where(condition, if_true, if_false)


def minimum(x: Int, y: Int) -> Int:
    is_plain = isinstance(x, int) and isinstance(y, int)
    return min(x, y) if is_plain else jnp.minimum(x, y)


def maximum(x: Int, y: Int) -> Int:
    is_plain = isinstance(x, int) and isinstance(y, int)
    return max(x, y) if is_plain else jnp.maximum(x, y)


def ceil_div(value: Int, divisor: int) -> Int:
    """How many times ``divisor`` it takes to reach ``value``, which is not negative."""
    numerator = value + divisor - 1
    if isinstance(value, int):
        return numerator // divisor
    return lax.div(numerator, jnp.int32(divisor))


def log2(power_of_two: int) -> int:
    return power_of_two.bit_length() - 1


def floor_to(value: Int, power_of_two: int) -> Int:
    """Rounds down, also below zero: ``floor_to(-3, 4) == -4``."""
    return value & -power_of_two


def ceil_to(value: Int, power_of_two: int) -> Int:
    return (value + (power_of_two - 1)) & -power_of_two

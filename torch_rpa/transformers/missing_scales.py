"""The warning that a cache of whole numbers has no scales."""

from __future__ import annotations

import functools
import warnings

import torch


def warn_of_missing_scales(
    cache_dtype: torch.dtype, k_scale: object | None, v_scale: object | None
) -> None:
    """Warns, once in a process, that keys or values become whole numbers.

    Float8 keeps as many digits of numbers near 1 without scales as with them.
    """
    if cache_dtype == torch.int8 and (k_scale is None or v_scale is None):
        _warn(k_scale is None, v_scale is None)


@functools.cache
def _warn(keys: bool, values: bool) -> None:
    stored = " and ".join(["keys"] * keys + ["values"] * values)
    scales = " and ".join(["k_scale"] * keys + ["v_scale"] * values)
    warnings.warn(
        f"a cache in int8 rounds {stored} to whole numbers without {scales}, which "
        "changes most texts: measure them with torch_rpa.measure_kv_scales(model, "
        "prompts, dtype=torch.int8), or give 1.0 if whole numbers are meant",
        stacklevel=2,
    )

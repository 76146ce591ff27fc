"""Warnings that a cache has no scales, though it needs some or there are some."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import nn

from torch_rpa.checkpoint_scales import brings_kv_scales


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


def warn_of_unused_scales(
    model: nn.Module,
    cache_dtype: torch.dtype,
    k_scale: object | None,
    v_scale: object | None,
) -> None:
    """Warns, once in a process, that scales of the checkpoint are not used.

    They are not taken by themselves, since they are made for one dtype.
    """
    is_float8 = cache_dtype.itemsize == 1 and cache_dtype.is_floating_point
    if is_float8 and k_scale is None and v_scale is None and brings_kv_scales(model):
        _warn_of_unused()


@functools.cache
def _warn_of_unused() -> None:
    warnings.warn(
        "the model brings scales of its keys and values, which a cache in float8 does "
        "not use by itself: give the k_scale and v_scale of torch_rpa.read_kv_scales("
        "model), or 1.0 if nothing is to be scaled",
        stacklevel=2,
    )

"""The contract of ``jax_kernels.contract``, for tensors of PyTorch.

:func:`validate_static` looks at shapes, dtypes and devices only: every device
implementation and the fake one call it. :func:`validate_values` looks at the numbers in
the metadata, which on an XLA device waits for them, so it runs on request only.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from jax_kernels import contract
from jax_kernels.contract import Arguments, ArraySpec, CallSizes, Metadata
from jax_kernels.contract.arguments import (
    OPTIONS_AS_ARRAYS,
    check_given,
    check_scale_values,
)
from torch_rpa.options import AttentionOptions, dtype_name

VALIDATE_ENV = "TORCH_RPA_VALIDATE"
_ON, _OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


class Inputs(Arguments[torch.Tensor]):
    """The tensors of one call, in the order of the operator's schema."""


def values_requested() -> bool:
    """Whether the environment asks for value checks in every call.

    Raises:
        ValueError: The variable holds a word that means neither yes nor no.
    """
    value = os.environ.get(VALIDATE_ENV)
    if not value:  # each call comes here
        return False
    word = value.strip().lower()
    if word not in _ON + _OFF:
        raise ValueError(
            f"{VALIDATE_ENV} must be one of {', '.join(_ON)}, or of "
            f"{', '.join(_OFF[1:])} or empty, got {value!r}"
        )
    return word in _ON


def validate_static(inputs: Inputs, options: AttentionOptions) -> CallSizes:
    """Checks shapes, dtypes, devices and strides; returns the sizes of the call."""
    check_given(inputs)
    validate_devices(inputs)
    specs = tuple(None if t is None else (t.shape, t.dtype) for t in inputs)
    try:
        sizes = _known_sizes(specs, options)
    except TypeError:  # symbolic sizes have no hash
        sizes = _checked_sizes(specs, options)
    if not inputs.kv_cache.is_contiguous():
        raise ValueError(
            f"kv_cache must be contiguous, got strides {inputs.kv_cache.stride()}"
        )
    return sizes


def _checked_sizes(
    specs: tuple[tuple[torch.Size, torch.dtype] | None, ...], options: AttentionOptions
) -> CallSizes:
    arrays: list[Any] = [
        None if spec is None else ArraySpec(tuple(spec[0]), dtype_name(spec[1]))
        for spec in specs
    ]
    return contract.check_arguments(Arguments(*arrays), options)


# Sizes that were checked before: the layers of a model, step after step, have the same.
_known_sizes = functools.lru_cache(maxsize=1024)(_checked_sizes)


def validate_devices(inputs: Inputs) -> None:
    """Checks that all tensors are on the device of q."""
    for name, tensor in inputs._asdict().items():
        if tensor is not None and tensor.device != inputs.q.device:
            raise ValueError(
                f"{name} must be on the device of q, {inputs.q.device}, "
                f"got {tensor.device}"
            )


def validate_gradients(tensors: Sequence[torch.Tensor | None]) -> None:
    """Raises if autograd would have to differentiate the operator."""
    # Forward mode asks for no requires_grad, and works under torch.no_grad().
    if forward_ad._current_level >= 0:
        tangents = [forward_ad.unpack_dual(t).tangent for t in tensors if t is not None]
        if any(tangent is not None for tangent in tangents):
            raise NotImplementedError(
                "rpa::ragged_paged_attention has no forward-mode derivative: call it "
                "with tensors that have no tangent, outside of torch.func.jvp"
            )
    if not torch.is_grad_enabled():
        return
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            raise NotImplementedError(
                "rpa::ragged_paged_attention has no backward: call it under "
                "torch.no_grad() or torch.inference_mode(), or detach its inputs"
            )


def validate_values(inputs: Inputs, options: AttentionOptions) -> None:
    """Checks the numbers of the metadata and of scales, waiting for them.

    See :func:`jax_kernels.contract.check_metadata`.
    """
    sizes = validate_static(inputs, options)
    contract.check_metadata(host_metadata(inputs), sizes, options)
    for name, option in OPTIONS_AS_ARRAYS.items():
        scales = getattr(inputs, name)
        if scales is not None:
            check_scale_values(option, scales.reshape(-1).tolist())


def validate_ranges(
    inputs: Inputs, sizes: CallSizes, options: AttentionOptions
) -> None:
    """Checks that lengths and page ids of CPU tensors lead out of no tensor.

    For implementations that would otherwise fail with a part of the cache written, or
    take a negative page id for one that counts from the end.
    """
    contract.check_ranges(host_metadata(inputs), sizes, options)


def host_metadata(inputs: Inputs) -> Metadata:
    """Returns the numbers of a step, waiting for them if they are on a device."""
    tensors = (getattr(inputs, name) for name in Metadata._fields)
    return Metadata(*(tensor.numpy(force=True) for tensor in tensors))

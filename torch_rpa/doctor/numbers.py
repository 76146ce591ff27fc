"""Whether the operator of a device computes what the reference does on the CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import torch_rpa
from torch_rpa import devices
from torch_rpa.doctor import batches, checks
from torch_rpa.doctor.batches import Kind
from torch_rpa.doctor.checks import Check
from torch_rpa.validation import Inputs

# Scaled queries and probabilities are rounded to bfloat16, whose unit of rounding is
# 2**-8, and errors of a few such roundings add up.
ROUNDING = 2**-8
MOST_ROUNDINGS = 4


class Comparison(NamedTuple):
    """How far a call is from the reference.

    Attributes:
        error: Largest error of the output, as a share of what is allowed.
        wrong_bytes: Bytes of the cache that differ from those of the reference.
    """

    error: float
    wrong_bytes: int


class Expected(NamedTuple):
    """What the reference computes in float32 of the same call.

    Attributes:
        out: ``[T, Hq, D]`` float32.
        magnitude: The same of the absolute values: the size of what was added up.
        kv_cache: The cache after the call.
    """

    out: torch.Tensor
    magnitude: torch.Tensor
    kv_cache: torch.Tensor


def expected(inputs: Inputs, options: dict[str, Any]) -> Expected:
    """Runs the reference on copies of CPU tensors."""
    kv_cache = inputs.kv_cache.clone()
    out = _reference(inputs, kv_cache, options)
    absolute = inputs._replace(v=None if inputs.v is None else inputs.v.abs())
    magnitude = _reference(absolute, _absolute_values(inputs.kv_cache), options)
    return Expected(out, magnitude, kv_cache)


def _reference(
    inputs: Inputs, kv_cache: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    tensors = inputs._replace(kv_cache=kv_cache)
    return torch_rpa.ragged_paged_attention(
        *tensors.positional, **options, out_dtype=torch.float32, impl="reference"
    )


def _absolute_values(kv_cache: torch.Tensor) -> torch.Tensor:
    """Returns a copy of a cache with the absolute values of its values."""
    copy = kv_cache.clone()
    sizes = batches.NUM_KV_HEADS, batches.HEAD_DIM
    values = torch_rpa.unpack_kv_cache(copy, *sizes)[:, 1]
    values.copy_(values.float().abs().to(copy.dtype))
    return copy


def compare(out: torch.Tensor, kv_cache: torch.Tensor, wanted: Expected) -> Comparison:
    """Compares an output in bfloat16 and a cache, both on the CPU."""
    allowed = MOST_ROUNDINGS * ROUNDING * wanted.magnitude
    allowed = allowed + ROUNDING * wanted.out.abs()
    error = (out.float() - wanted.out).abs()
    # Where nothing is added up, nothing but zero is right. NaN is never right.
    shares = torch.where(allowed > 0, error / allowed, error * torch.inf)
    shares = torch.where(error == 0, 0.0, shares).nan_to_num(torch.inf)
    caches = kv_cache, wanted.kv_cache
    got, want = (cache.contiguous().view(torch.uint8) for cache in caches)
    return Comparison(shares.max().item(), int((got != want).sum()))


def check(
    name: str,
    kind: Kind,
    cache_dtype: torch.dtype,
    device: torch.device,
    impl: str | None = None,
) -> Check:
    """Runs a call on a device and compares it.

    Args:
        name: Of the check.
        kind: Lengths of the step.
        cache_dtype: A key of ``batches.SCALES``.
        device: An open device.
        impl: As in :func:`torch_rpa.ragged_paged_attention`.
    """
    inputs, options = batches.make(kind, cache_dtype), batches.options_of(cache_dtype)
    there = batches.moved(inputs, device)
    devices.sync(device, wait=True)
    out = torch_rpa.ragged_paged_attention(*there.positional, **options, impl=impl)
    devices.sync(device, wait=True)
    found = compare(out.cpu(), there.kv_cache.cpu(), expected(inputs, options))
    return verdict(name, found)


def verdict(name: str, found: Comparison) -> Check:
    """Says whether a call is right."""
    figures = found._asdict()
    text = f"the largest error is {found.error:.2f} of what is allowed"
    if found.error <= 1 and not found.wrong_bytes:
        return checks.ok(name, f"{text}, the cache is right in every byte", **figures)
    if found.wrong_bytes:
        text += f", and {found.wrong_bytes} bytes of the cache are wrong"
    return checks.failed(name, text, checks.REPORT, **figures)

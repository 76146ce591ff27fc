"""Which tokens top-k, top-p and min-p keep, without sorting the vocabulary.

All three keep the most likely tokens and cut somewhere. So what each of them comes to
is one number for each row, the least logit that it keeps. Its sign, its exponent and
its mantissa are searched for bit by bit: a bit is set if enough tokens are still at or
above the number. A pass reads all logits once, and there are as many passes as the
number has bits. The result is exact, and the work does not depend on any parameter: one
program serves them all. Tensors on the CPU need no program, and have a shorter way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_EXPONENT_BITS, _SMALLEST = 8, 2.0**-126  # of normal numbers of bfloat16 and float32
_MANTISSA_BITS = {torch.bfloat16: 7}
_FIRST_SIZE, _GROWTH = 64, 8  # tokens that are looked at first on the CPU


def kept(
    logits: torch.Tensor,
    scaled: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """Returns which tokens may be drawn: bool ``[S, V]``, at least one of each row.

    First come the ``top_k`` most likely tokens, then the most likely of these that make
    up ``top_p`` of their probability, then those of these that are at least ``min_p``
    times as likely as the most likely one, as in transformers. A token as likely as the
    last one that is in, is in.

    Args:
        logits: ``[S, V]``, of any dtype. Those in bfloat16 take half the passes.
        scaled: f32 ``[S, V]``, the logits divided by the temperature.
        top_k: i32 ``[S]``, at least 1; V keeps all.
        top_p: f32 ``[S]``; more than 1 keeps all.
        min_p: f32 ``[S]``; 0 keeps all.
    """
    bits = _MANTISSA_BITS.get(logits.dtype, 23)
    logits = logits.float()
    # All devices agree that numbers that are not normal are zero.
    logits = torch.where(logits.abs() < _SMALLEST, 0.0, logits)
    weights = (scaled - scaled.amax(dim=-1, keepdim=True)).exp()
    is_kept = weights >= min_p[:, None]
    if _can_look(logits):
        return is_kept & (
            logits >= _least_kept_by_looking(logits, weights, top_k, top_p)
        )

    def reaches_top_k(least: torch.Tensor) -> torch.Tensor:
        # Not in 64 bits, which a TPU does not have.
        count = (logits >= least).sum(-1, keepdim=True, dtype=torch.int32)
        return count >= top_k[:, None]

    in_top_k = logits >= _highest(reaches_top_k, logits, bits)
    weights = torch.where(in_top_k, weights, 0.0)
    enough = top_p[:, None] * weights.sum(dim=-1, keepdim=True)

    def reaches_top_p(least: torch.Tensor) -> torch.Tensor:
        # Rounding is monotone: with more tokens the sum is never less.
        mass = torch.where(logits >= least, weights, 0.0).sum(-1, keepdim=True)
        return mass >= enough

    in_top_p = logits >= _highest(reaches_top_p, logits, bits)
    return is_kept & in_top_k & in_top_p


def _least_kept_by_looking(
    logits: torch.Tensor,
    weights: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
) -> torch.Tensor:
    """Returns f32 ``[S, 1]`` on the CPU: the least logit within top-k and top-p.

    Here one can look at numbers, so no more is done than they need: the most likely
    tokens are taken, more and more of them until the answer is among them.
    """
    vocabulary = logits.shape[-1]
    least = torch.full_like(logits[:, :1], -torch.inf)
    is_limited = top_k < vocabulary
    if is_limited.any():
        most = int(top_k[is_limited].max())
        values = logits.topk(most, dim=-1).values
        last = values.gather(1, top_k[:, None].clamp(max=most).long() - 1)
        least = torch.where(is_limited[:, None], last, least)
        weights = torch.where(logits >= least, weights, 0.0)
    is_open = top_p <= 1
    enough = top_p[:, None] * weights.sum(dim=-1, keepdim=True)
    size = _FIRST_SIZE
    while is_open.any():
        size = min(size, vocabulary)
        values, tokens = logits.topk(size, dim=-1)
        is_reached = weights.gather(1, tokens).cumsum(dim=-1) >= enough
        first = is_reached.int().argmax(dim=-1, keepdim=True)
        is_settled = is_open & (is_reached.any(dim=-1) | (size == vocabulary))
        # If rounding leaves a share of 1 unreached, all tokens are needed.
        first = torch.where(is_reached.any(dim=-1, keepdim=True), first, size - 1)
        least = torch.where(
            is_settled[:, None], torch.maximum(least, values.gather(1, first)), least
        )
        is_open = is_open & ~is_settled
        size *= _GROWTH
    return least


def _highest(
    is_enough: Callable[[torch.Tensor], torch.Tensor],
    logits: torch.Tensor,
    mantissa_bits: int,
) -> torch.Tensor:
    """Returns f32 ``[S, 1]``: the highest number that is low enough.

    It may be minus infinity. No step of the search rounds.

    Args:
        is_enough: Whether numbers f32 ``[S, 1]`` are low enough: bool ``[S, 1]``.
        logits: f32 ``[S, V]``, for shape and device.
        mantissa_bits: Of the numbers to choose from, which are normal or zero.
    """
    zero = torch.zeros_like(logits[:, :1])
    is_positive = is_enough(zero)
    sign = torch.where(is_positive, 1.0, -1.0)

    def goes_on(magnitude: torch.Tensor) -> torch.Tensor:
        # Of numbers above zero the last one that is low enough is wanted, of those
        # below zero the one after the last one that is not.
        return is_enough(sign * magnitude) == is_positive

    found = zero + _SMALLEST
    is_beyond_smallest = goes_on(found)
    for bit in reversed(range(_EXPONENT_BITS)):
        # In two steps, for 2**128 is no number.
        root = 2.0 ** (2**bit / 2)
        larger = found * 2.0 if bit == 0 else found * root * root
        found = torch.where(goes_on(larger), larger, found)
    step = found
    for _ in range(mantissa_bits):
        step = step * 0.5
        larger = found + step
        found = torch.where(goes_on(larger), larger, found)
    return torch.where(
        is_beyond_smallest,
        torch.where(is_positive, found, -(found + step)),
        torch.where(is_positive, zero, -_SMALLEST),
    )


def _can_look(tensor: torch.Tensor) -> bool:
    """Whether numbers can be read without waiting for a device."""
    return tensor.device.type == "cpu"

"""Chooses the next tokens on the device, reproducibly for each request.

A request with a seed gets the same random numbers for the same position of its text
whatever else is in the batch, and whether or not it was preempted: they are a hash of
its seed, the position and the token id, not the state of a generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from torch_rpa.serving import thresholds
from torch_rpa.serving.sampling_params import SamplingParams

_GREEDY = SamplingParams()


class SamplingInputs(NamedTuple):
    """How to choose the next token of each row, padded to S rows."""

    temperature: torch.Tensor  # f32[S], 0 where greedy
    top_k: torch.Tensor  # i32[S]
    top_p: torch.Tensor  # f32[S]
    min_p: torch.Tensor  # f32[S]
    keys: torch.Tensor  # i32[2, S] random bits of each row

    def to(self, device: torch.device | str) -> SamplingInputs:
        """Moves every tensor to a device."""
        return SamplingInputs(*(tensor.to(device) for tensor in self))


def build_sampling_inputs(
    rows: Sequence[tuple[SamplingParams, int, int]], num_rows: int, vocabulary: int
) -> SamplingInputs:
    """Builds the tensors of a step on the host.

    Args:
        rows: Parameters, seed and position of the new token for each row.
        num_rows: S; further rows are greedy.
        vocabulary: Number of logits, which stands for "no top-k".
    """
    padding = [(_GREEDY, 0, 0)] * (num_rows - len(rows))
    params, seeds, positions = zip(*rows, *padding, strict=True)
    return SamplingInputs(
        torch.tensor([p.temperature for p in params]),
        torch.tensor([p.top_k or vocabulary for p in params], dtype=torch.int32),
        # More than any sum of rounded probabilities keeps all of them.
        torch.tensor([p.top_p if p.top_p < 1 else 2.0 for p in params]),
        torch.tensor([p.min_p for p in params], dtype=torch.float32),
        torch.tensor(
            [_random_bits(*pair) for pair in zip(seeds, positions, strict=True)],
            dtype=torch.int32,
        ).T.contiguous(),
    )


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """Returns the most likely token of each row: ``[S, V]`` to i64 ``[S]``."""
    return logits.argmax(dim=-1)


def sample(logits: torch.Tensor, inputs: SamplingInputs) -> torch.Tensor:
    """Draws a token for each row: ``[S, V]`` to i64 ``[S]``.

    The largest of logit plus Gumbel noise is distributed as the softmax of the logits.
    Only among the tokens that :func:`torch_rpa.serving.thresholds.kept` tells.
    """
    temperature = inputs.temperature[:, None]
    scaled = logits.float() / torch.where(temperature > 0, temperature, 1.0)
    kept = thresholds.kept(logits, scaled, inputs.top_k, inputs.top_p, inputs.min_p)
    noisy = scaled + _gumbel(inputs.keys, logits.shape[-1])
    sampled = torch.where(kept, noisy, -torch.inf).argmax(dim=-1)
    return torch.where(inputs.temperature > 0, sampled, greedy(logits))


def _gumbel(keys: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Returns standard Gumbel noise f32 ``[S, V]``, a function of row key and token."""
    first, second = keys[:, :, None]
    tokens = torch.arange(vocabulary, dtype=torch.int32, device=keys.device)
    bits = _mix(_mix(tokens ^ first) ^ second)
    # 23 bits and a half: never 0 or 1, and exact in float32.
    uniform = (_shift(bits, 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """Scrambles 32 bits so that each depends on all: a bijection on i32."""
    bits = (bits ^ _shift(bits, 16)) * 0x7FEB352D
    bits = (bits ^ _shift(bits, 15)) * (0x846CA68B - 2**32)
    return bits ^ _shift(bits, 16)


def _shift(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Shifts right and fills with zeros, which ``>>`` on i32 does not.

    torch_xla 2.9 divides instead of shifting, which is the same for multiples.
    """
    multiple = bits & -(1 << count)
    return (multiple >> count) & ((1 << (32 - count)) - 1)


def _random_bits(seed: int, position: int) -> tuple[int, int]:
    """Returns two i32, the same for the same seed and position."""
    digest = hashlib.blake2b(b"%d %d" % (seed, position), digest_size=8).digest()
    return (
        int.from_bytes(digest[:4], "little", signed=True),
        int.from_bytes(digest[4:], "little", signed=True),
    )

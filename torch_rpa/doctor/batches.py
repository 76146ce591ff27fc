"""Small calls of each kind of step, whose older tokens are in the cache already."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

import torch_rpa
from torch_rpa.validation import Inputs

# One program for each dtype of the cache serves all kinds of steps: sizes are static.
NUM_TOKENS, NUM_SEQUENCES, PAGES_PER_SEQUENCE, NUM_PAGES = 64, 8, 2, 20
PAGE_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 128, 8, 2, 128
CHUNK = 16  # chunk_prefill_size


@dataclasses.dataclass(frozen=True)
class Kind:
    """Lengths of a step, as ``(new tokens, all tokens)`` of each sequence.

    Attributes:
        decodes: Those with one new token.
        chunks: Those with ``CHUNK`` new tokens.
        others: Those with any number of them.
    """

    decodes: Sequence[tuple[int, int]] = ()
    chunks: Sequence[tuple[int, int]] = ()
    others: Sequence[tuple[int, int]] = ()


# Lengths at both sides of a page, new tokens that cross into a page, whole prompts.
KINDS = {
    "decode": Kind(decodes=[(1, n) for n in (1, 77, 128, 129, 200, 256)]),
    "prefill": Kind(chunks=[(CHUNK, n) for n in (16, 135, 256)]),
    "mixed": Kind(
        decodes=[(1, 130), (1, 64)], chunks=[(CHUNK, 144)], others=[(20, 20), (5, 131)]
    ),
}
# What a stored key or value is multiplied by. Random numbers then fill the range.
SCALES = {torch.bfloat16: None, torch.float8_e4m3fn: 1 / 16, torch.int8: 1 / 32}


def options_of(cache_dtype: torch.dtype) -> dict[str, Any]:
    """Returns the options of a call with a cache of a dtype."""
    scale = SCALES[cache_dtype]
    return {
        "sm_scale": HEAD_DIM**-0.5,
        "k_scale": scale,
        "v_scale": scale,
        "chunk_prefill_size": CHUNK,
    }


def make(kind: Kind, cache_dtype: torch.dtype, *, num_pages: int = NUM_PAGES) -> Inputs:
    """Returns the CPU tensors of a call, the same ones each time.

    Pages are shuffled; page 0 belongs to no sequence.

    Args:
        kind: Lengths.
        cache_dtype: A key of ``SCALES``.
        num_pages: Pages of the cache; sequences have the first ``NUM_PAGES`` of them.
    """
    lengths = [*kind.decodes, *kind.chunks, *kind.others]
    generator = torch.Generator().manual_seed(0)

    def tokens(num_heads: int) -> torch.Tensor:
        shape = NUM_TOKENS, num_heads, HEAD_DIM
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    kv_lens = torch.zeros(NUM_SEQUENCES, dtype=torch.int32)
    starts = torch.zeros(NUM_SEQUENCES + 1, dtype=torch.int32)
    for sequence, (new_tokens, all_tokens) in enumerate(lengths):
        kv_lens[sequence] = all_tokens
        starts[sequence + 1 :] = starts[sequence] + new_tokens
    pages = torch.randperm(NUM_PAGES - 1, generator=generator) + 1
    page_indices = pages[: NUM_SEQUENCES * PAGES_PER_SEQUENCE].to(torch.int32)
    num_decodes, num_chunks = len(kind.decodes), len(kind.chunks)
    distribution = [num_decodes, num_decodes + num_chunks, len(lengths)]
    return Inputs(
        tokens(NUM_HEADS),
        tokens(NUM_KV_HEADS),
        tokens(NUM_KV_HEADS),
        filled_cache(cache_dtype, num_pages),
        kv_lens,
        page_indices,
        starts,
        torch.tensor(distribution, dtype=torch.int32),
        None,
    )


def filled_cache(cache_dtype: torch.dtype, num_pages: int) -> torch.Tensor:
    """Returns a cache whose first ``NUM_PAGES`` pages hold random numbers."""
    kv_cache = torch_rpa.empty_kv_cache(
        num_pages, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=cache_dtype
    )
    kv_cache[:NUM_PAGES] = _random_pages(cache_dtype)
    return kv_cache


@functools.cache
def _random_pages(cache_dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = torch_rpa.kv_cache_shape(
        NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=cache_dtype
    )
    numbers = torch.randn(shape, generator=generator).clamp(-3.5, 3.5)
    return (numbers / (SCALES[cache_dtype] or 1.0)).to(cache_dtype)


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """Returns copies of the tensors on a device."""
    copies: list[Any] = [None if x is None else x.clone().to(device) for x in inputs]
    return Inputs(*copies)

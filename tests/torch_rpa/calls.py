"""Small ragged batches for the tests of the torch operator."""

from __future__ import annotations

import os
from typing import NamedTuple, TypeVar

import ml_dtypes  # noqa: F401  (names bfloat16 and float8 for NumPy)
import numpy as np
import torch

import torch_rpa
from tests.support import numerics
from tests.support.ragged_batches import RaggedBatch
from torch_rpa.validation import Inputs

GARBAGE = -(2**31)  # as a page id or a length it would be noticed


class Call(NamedTuple):
    """The tensors that functions and operators take by position."""

    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    kv_cache: torch.Tensor
    kv_lens: torch.Tensor
    page_indices: torch.Tensor
    cu_q_lens: torch.Tensor
    distribution: torch.Tensor
    sinks: torch.Tensor | None = None


AnyCall = TypeVar("AnyCall", Call, Inputs)


def make_call(
    lengths: list[tuple[int, int]] | None = None,
    *,
    num_tokens: int = 24,
    max_seqs: int = 5,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 128,
    page_size: int = 8,
    pages_per_seq: int = 4,
    num_pages: int = 32,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype = torch.bfloat16,
    sinks: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Call:
    """Makes one call whose older tokens are in the cache already.

    Pages are shuffled. Metadata at or past the live sequences, and page ids past the
    live pages, are garbage.

    Args:
        lengths: ``(q_len, kv_len)`` of each live sequence, decodes first.
        num_tokens: T; the rows after the last sequence are padding.
        max_seqs: S.
    """
    if lengths is None:
        lengths = [(1, 13), (1, 8), (9, 9), (7, 30)]
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    kv_cache = torch_rpa.empty_kv_cache(
        num_pages, page_size, num_kv_heads, head_dim, dtype=cache_dtype
    )
    pages = torch_rpa.unpack_kv_cache(kv_cache, num_kv_heads, head_dim)
    filling = torch.randn(pages.shape, generator=generator)
    pages.copy_(filling * 8 if cache_dtype == torch.int8 else filling)

    live = len(lengths)
    kv_lens = torch.full((max_seqs,), GARBAGE, dtype=torch.int32)
    cu_q_lens = torch.full((max_seqs + 1,), GARBAGE, dtype=torch.int32)
    page_table = torch.full((max_seqs, pages_per_seq), GARBAGE, dtype=torch.int32)
    free_pages = iter(torch.randperm(num_pages, generator=generator).tolist())
    cu_q_lens[0] = 0
    for seq, (q_len, kv_len) in enumerate(lengths):
        kv_lens[seq] = kv_len
        cu_q_lens[seq + 1] = cu_q_lens[seq] + q_len
        for index in range(-(-kv_len // page_size)):
            page_table[seq, index] = next(free_pages)
    decodes = 0
    while decodes < live and lengths[decodes][0] == 1:
        decodes += 1
    call = Call(
        q=randn(num_tokens, num_q_heads, head_dim),
        k=randn(num_tokens, num_kv_heads, head_dim),
        v=randn(num_tokens, num_kv_heads, head_dim),
        kv_cache=kv_cache,
        kv_lens=kv_lens,
        page_indices=page_table.reshape(-1),
        cu_q_lens=cu_q_lens,
        distribution=torch.tensor([decodes, decodes, live], dtype=torch.int32),
        sinks=torch.randn(num_q_heads, generator=generator) if sinks else None,
    )
    return to_device(call, device)


def to_device(call: AnyCall, device: torch.device | str) -> AnyCall:
    """Returns copies of the tensors on a device, the cache included."""
    return call._make(None if t is None else t.to(device, copy=True) for t in call)


def assert_same_up_to_rounding(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Compares results whose sums were taken in another order.

    A TPU multiplies float32 in parts of bfloat16.
    """
    assert out.dtype == expected.dtype
    on_tpu = os.environ.get("PJRT_DEVICE") == "TPU" and out.device.type == "xla"
    step = torch.finfo(torch.bfloat16 if on_tpu else expected.dtype).eps
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(
        out.cpu(), expected, rtol=4 * step, atol=64 * step * scale
    )


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bytes of a tensor, for exact comparisons of any dtype."""
    return tensor.detach().cpu().contiguous().view(torch.uint8)


def from_batch(batch: RaggedBatch, device: torch.device | str = "cpu") -> Call:
    """The tensors of a hostile batch: NaN in dead slots and padding, garbage ids."""
    return Call._make(
        None if x is None else from_numpy(x).to(device) for x in batch.arguments
    )


def assert_matches_oracle(
    out: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    call: Call,
    batch: RaggedBatch,
    **options,
) -> None:
    """Fails unless out is within its error budget and every byte of the cache right.

    So are the logarithms, if they come with out.
    """
    out, lse = out if isinstance(out, tuple) else (out, None)
    with np.errstate(invalid="ignore"):  # padding rows of int8 queries: NaN to integer
        numerics.assert_matches_oracle(
            to_numpy(out),
            to_numpy(call.kv_cache),
            batch.arguments,
            lse=None if lse is None else to_numpy(lse),
            **options,
        )


def from_numpy(array: np.ndarray) -> torch.Tensor:
    dtype = getattr(torch, array.dtype.name)
    return torch.from_numpy(np.array(array).view(np.uint8)).view(dtype)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Returns an array of the same bytes, also of a dtype that NumPy does not have."""
    dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
    return raw_bytes(tensor).numpy().view(dtype)

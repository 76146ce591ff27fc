"""Attention of sequences that begin with the same tokens, which are read once."""

from __future__ import annotations

from typing import Any

import torch

from torch_rpa.api import ragged_paged_attention
from torch_rpa.merging import merge_attention


def cascade_attention(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    kv_cache: torch.Tensor,
    kv_lens: torch.Tensor,
    page_indices: torch.Tensor,
    cu_q_lens: torch.Tensor,
    distribution: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    prefix_len: torch.Tensor,
    prefix_page_indices: torch.Tensor,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """:func:`torch_rpa.ragged_paged_attention` of sequences with a common prefix.

    Two calls of the operator and a merge. The first one has all queries attend to the
    prefix, as those of one sequence: its pages are read once, by matrix products of
    many rows. The second one has each sequence attend to what comes after the prefix,
    and writes the new tokens. ``benchmarks/README.md`` has predicted times: for 64
    decodes it pays from a prefix of 256 tokens on.

    Args:
        q: ``[T, Hq, D]``, and so on as for the operator, but for the following two.
        k: See there.
        v: See there.
        kv_cache: Holds the pages of the prefix as well.
        kv_lens: ``[S]``, tokens of each sequence after the prefix, the new ones
            included.
        page_indices: ``[S * P]``, pages of what comes after the prefix.
        cu_q_lens: See the operator.
        distribution: See the operator.
        sinks: See the operator.
        prefix_len: int32 ``[1]``, tokens of the prefix. All sequences have it.
        prefix_page_indices: int32 ``[P0]``, pages of the prefix.
        return_lse: See the operator.
        options: Other keyword arguments of the operator, but for ``attend``.

    Returns:
        What the operator does.

    Raises:
        ValueError: See the operator.
        NotImplementedError: ``sliding_window`` is given: by it each query would see
            another part of the prefix.
    """
    if options.get("sliding_window") is not None:
        raise NotImplementedError(
            "sliding_window is not supported by cascade_attention, got "
            f"{options['sliding_window']}: give each sequence its whole page table and "
            "call ragged_paged_attention, which reads the window alone"
        )
    if options.pop("attend", "all") != "all":
        raise NotImplementedError(
            "attend must be 'all' in cascade_attention: call ragged_paged_attention "
            "for parts of the keys"
        )
    end = cu_q_lens[distribution[2:].long()]  # [1]
    start = torch.zeros_like(end)
    prefix_options = options | {
        "chunk_prefill_size": None,
        "decode_q_len": 1,
        "update_kv_cache": False,
    }
    prefix = ragged_paged_attention(
        q,
        None,
        None,
        kv_cache,
        prefix_len + end,  # as if the queries came after it
        prefix_page_indices,
        torch.cat([start, end]),
        torch.cat([start, start, torch.ones_like(end)]),
        attend="cache",
        return_lse=True,
        **prefix_options,
    )
    metadata = (kv_lens, page_indices, cu_q_lens, distribution)
    suffix = ragged_paged_attention(
        q, k, v, kv_cache, *metadata, sinks, return_lse=True, **options
    )
    out, lse = merge_attention(*zip(prefix, suffix, strict=True))
    return (out, lse) if return_lse else out

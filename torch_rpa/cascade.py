"""Attention of sequences that begin with the same tokens, which are read once."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from jax_kernels.contract import CallSizes
from jax_kernels.contract.options import check_bool
from torch_rpa import validation
from torch_rpa.api import ragged_paged_attention
from torch_rpa.merging import merge_attention
from torch_rpa.options import dtype_name, make_options, split_tensors
from torch_rpa.validation import Inputs


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
        prefix_page_indices: int32 ``[P0]``, pages of the prefix. Entries past the last
            one that it needs are ignored. No new token may be written over its tokens.
        return_lse: See the operator.
        options: Other keyword arguments of the operator, but for ``attend``.

    Returns:
        What the operator does.

    Raises:
        ValueError: See the operator. Values of the arguments for the prefix are checked
            when the operator would check those of its own.
        NotImplementedError: ``sliding_window`` is given: by it each query would see
            another part of the prefix. Or ``causal_block`` is, which counts positions
            from the start of the prefix. Or ``batch_invariant`` is.
    """
    if options.get("sliding_window") is not None:
        raise NotImplementedError(
            "sliding_window is not supported by cascade_attention, got "
            f"{options['sliding_window']}: give each sequence its whole page table and "
            "call ragged_paged_attention, which reads the window alone"
        )
    if options.get("causal_block") is not None:
        raise NotImplementedError(
            "causal_block is not supported by cascade_attention, got "
            f"{options['causal_block']}: give each sequence its whole page table and "
            "call ragged_paged_attention"
        )
    if options.get("batch_invariant"):
        raise NotImplementedError(
            "batch_invariant is not supported by cascade_attention, where the other "
            "sequences decide which keys are summed apart: call ragged_paged_attention"
        )
    if options.pop("attend", "all") != "all":
        raise NotImplementedError(
            "attend must be 'all' in cascade_attention: call ragged_paged_attention "
            "for parts of the keys"
        )
    check_bool("return_lse", return_lse)
    metadata = (kv_lens, page_indices, cu_q_lens, distribution)
    if not torch.compiler.is_compiling():  # there the fakes of the operator check
        tensors, numbers = split_tensors(options)
        inputs = Inputs(q, k, v, kv_cache, *metadata, sinks, **tensors)
        _check(inputs, prefix_len, prefix_page_indices, numbers)
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
    suffix = ragged_paged_attention(
        q, k, v, kv_cache, *metadata, sinks, return_lse=True, **options
    )
    out, lse = merge_attention(*zip(prefix, suffix, strict=True))
    return (out, lse) if return_lse else out


def _check(
    inputs: Inputs,
    prefix_len: torch.Tensor,
    prefix_page_indices: torch.Tensor,
    options: dict[str, Any],
) -> None:
    """Checks all arguments by their own names, before any is made into another."""
    how = {"impl", "validate"}
    attention_options = make_options(
        {name: value for name, value in options.items() if name not in how}
    )
    sizes = validation.validate_static(inputs, attention_options)
    _check_tensor("prefix_len", prefix_len, inputs.q.device, "[1]")
    _check_tensor("prefix_page_indices", prefix_page_indices, inputs.q.device, "[P0]")
    is_on_host = inputs.q.device.type == "cpu" and not is_fake(inputs.q)
    if is_on_host or options.get("validate") or validation.values_requested():
        validation.validate_ranges(inputs, sizes, attention_options)
        if int(inputs.cu_q_lens[int(inputs.distribution[2])]):  # else nothing reads it
            _check_values(int(prefix_len), prefix_page_indices.tolist(), sizes)


def _check_tensor(name: str, tensor: Any, device: torch.device, shape: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor int32 {shape}, got {tensor!r}")
    fits = tensor.shape == (1,) if shape == "[1]" else tensor.dim() == 1
    if not fits or not tensor.numel() or tensor.dtype != torch.int32:
        raise ValueError(
            f"{name} must be int32 {shape}, got {dtype_name(tensor.dtype)} "
            f"{list(tensor.shape)}"
        )
    if tensor.device != device:
        raise ValueError(
            f"{name} must be on the device of q, {device}, got {tensor.device}"
        )


def _check_values(length: int, pages: list[int], sizes: CallSizes) -> None:
    page_size, num_pages = sizes.cache.page_size, sizes.cache.num_pages
    most = len(pages) * page_size
    if not 0 <= length <= most:
        raise ValueError(
            f"prefix_len must be in [0, {most}] (the pages of prefix_page_indices), "
            f"got {length}"
        )
    first_use: dict[int, int] = {}
    for index, page in enumerate(pages[: -(-length // page_size)]):
        if not 0 <= page < num_pages:
            raise ValueError(
                f"prefix_page_indices[{index}] must be in [0, {num_pages}), got {page}"
            )
        if first_use.setdefault(page, index) != index:
            raise ValueError(
                "prefix_page_indices must name each page once, got page "
                f"{page} at {first_use[page]} and at {index}"
            )

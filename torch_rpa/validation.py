"""The tensor contract of the operator.

:func:`validate_static` looks at shapes, dtypes and devices only: every device
implementation and the fake one call it. :func:`validate_values` looks at the numbers in
the metadata, which on an XLA device waits for them, so it runs on request only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

from torch_rpa import kv_cache as kv_cache_lib
from torch_rpa.options import AttentionOptions

VALIDATE_ENV = "TORCH_RPA_VALIDATE"
INPUT_DTYPES = (torch.bfloat16, torch.float32)


class Inputs(NamedTuple):
    """The tensors of one call, in the order of the operator's schema."""

    q: torch.Tensor  # [T, Hq, D]
    k: torch.Tensor | None  # [T, Hkv, D]
    v: torch.Tensor | None  # [T, Hkv, D]
    kv_cache: torch.Tensor  # see torch_rpa.kv_cache
    kv_lens: torch.Tensor  # i32[S]
    page_indices: torch.Tensor  # i32[S * P]
    cu_q_lens: torch.Tensor  # i32[S + 1]
    distribution: torch.Tensor  # i32[3]
    sinks: torch.Tensor | None = None  # f32[Hq]


def values_requested() -> bool:
    """Whether the environment asks for value checks in every call."""
    return os.environ.get(VALIDATE_ENV, "0") not in ("", "0")


def validate_static(
    inputs: Inputs, options: AttentionOptions
) -> kv_cache_lib.CacheGeometry:
    """Checks shapes, dtypes and devices; returns the sizes of the cache."""
    q, k, v, kv_cache = inputs.q, inputs.k, inputs.v, inputs.kv_cache
    for name, tensor in inputs._asdict().items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(
                f"{name} must be on the device of q, {q.device}, got {tensor.device}"
            )
    if q.dim() != 3 or 0 in q.shape:
        raise ValueError(f"q must have shape [T, Hq, D], got {list(q.shape)}")
    if q.dtype not in INPUT_DTYPES:
        raise ValueError(f"q must have one of {INPUT_DTYPES}, got {q.dtype}")
    num_tokens, num_q_heads, head_dim = q.shape
    geometry = kv_cache_lib.cache_geometry(kv_cache.shape, kv_cache.dtype, head_dim)
    if num_q_heads % geometry.num_kv_heads:
        raise ValueError(
            f"q must have a multiple of the {geometry.num_kv_heads} heads of kv_cache, "
            f"got {num_q_heads} heads"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor is not None:
            shape = (num_tokens, geometry.num_kv_heads, head_dim)
            _check_tensor(name, tensor, q.dtype, shape)
        elif options.update_kv_cache:
            raise ValueError(
                f"{name} must be a tensor, got None; pass update_kv_cache=False to "
                "read all keys and values from kv_cache"
            )
    if options.q_scale is not None and (
        kv_cache.dtype not in kv_cache_lib.QUANTIZED_DTYPES
    ):
        raise ValueError(
            f"q_scale must be None unless kv_cache is one of "
            f"{kv_cache_lib.QUANTIZED_DTYPES}, got {options.q_scale} with "
            f"{kv_cache.dtype}"
        )
    _validate_metadata_shapes(inputs)
    if inputs.sinks is not None:
        _check_tensor("sinks", inputs.sinks, torch.float32, (num_q_heads,))
    return geometry


def _validate_metadata_shapes(inputs: Inputs) -> None:
    if inputs.kv_lens.dim() != 1 or inputs.kv_lens.shape[0] < 1:
        raise ValueError(
            f"kv_lens must have shape [S], got {list(inputs.kv_lens.shape)}"
        )
    num_seqs = inputs.kv_lens.shape[0]
    _check_tensor("kv_lens", inputs.kv_lens, torch.int32, (num_seqs,))
    _check_tensor("cu_q_lens", inputs.cu_q_lens, torch.int32, (num_seqs + 1,))
    _check_tensor("distribution", inputs.distribution, torch.int32, (3,))
    pages = inputs.page_indices
    if pages.dim() != 1 or pages.shape[0] < 1 or pages.shape[0] % num_seqs:
        raise ValueError(
            f"page_indices must have shape [S * P] with S = {num_seqs}, "
            f"got {list(pages.shape)}"
        )
    _check_tensor("page_indices", pages, torch.int32, tuple(pages.shape))


def _check_tensor(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]
) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} must be {dtype} {list(shape)}, "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )


def validate_gradients(tensors: Sequence[torch.Tensor | None]) -> None:
    """Raises if autograd would have to differentiate the operator."""
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    ):
        raise NotImplementedError(
            "rpa::ragged_paged_attention has no backward: call it under "
            "torch.no_grad() or torch.inference_mode(), or detach its inputs"
        )


def validate_values(inputs: Inputs, options: AttentionOptions) -> None:
    """Checks lengths, page ids and the distribution; waits for the metadata.

    Only the live entries are looked at: sequences before ``distribution[2]``, and of
    each the first ``ceil(kv_len / page_size)`` pages.
    """
    geometry = validate_static(inputs, options)
    num_seqs = inputs.kv_lens.shape[0]
    max_pages = inputs.page_indices.shape[0] // num_seqs
    decode_end, prefill_end, live = inputs.distribution.tolist()
    if not 0 <= decode_end <= prefill_end <= live <= num_seqs:
        raise ValueError(
            f"distribution must satisfy 0 <= i <= j <= k <= {num_seqs}, "
            f"got {[decode_end, prefill_end, live]}"
        )
    kv_lens = inputs.kv_lens.tolist()[:live]
    cu_q_lens = inputs.cu_q_lens.tolist()[: live + 1]
    page_table = inputs.page_indices.view(num_seqs, max_pages).tolist()
    if live and cu_q_lens[0] != 0:
        raise ValueError(f"cu_q_lens[0] must be 0, got {cu_q_lens[0]}")
    written: dict[tuple[int, int], int] = {}
    for seq, kv_len in enumerate(kv_lens):
        q_len = cu_q_lens[seq + 1] - cu_q_lens[seq]
        _validate_lengths(seq, q_len, kv_len, max_pages * geometry.page_size)
        if seq < decode_end:
            _validate_phase("decode", seq, q_len, 1)
        elif seq < prefill_end and options.chunk_prefill_size is not None:
            _validate_phase("prefill", seq, q_len, options.chunk_prefill_size)
        if q_len == 0 or kv_len == 0:
            continue
        num_live_pages = -(-kv_len // geometry.page_size)
        for index, page in enumerate(page_table[seq][:num_live_pages]):
            if not 0 <= page < geometry.num_pages:
                raise ValueError(
                    f"page_indices[{seq * max_pages + index}] (page {index} of sequence"
                    f" {seq}) must be in [0, {geometry.num_pages}), got {page}"
                )
        if not options.update_kv_cache:
            continue
        for position in range(kv_len - q_len, kv_len):
            index, slot = divmod(position, geometry.page_size)
            place = (page_table[seq][index], slot)
            if place in written:
                raise ValueError(
                    f"page_indices must give each new token its own slot, got page "
                    f"{place[0]} slot {slot} for sequences {written[place]} and {seq}"
                )
            written[place] = seq
    if live and cu_q_lens[live] > inputs.q.shape[0]:
        raise ValueError(
            f"cu_q_lens[{live}] must be at most the {inputs.q.shape[0]} tokens of q, "
            f"got {cu_q_lens[live]}"
        )


def _validate_lengths(seq: int, q_len: int, kv_len: int, capacity: int) -> None:
    if q_len < 0:
        raise ValueError(
            f"cu_q_lens must not decrease, got {q_len} tokens for sequence {seq}"
        )
    if not 0 <= kv_len <= capacity:
        raise ValueError(
            f"kv_lens[{seq}] must be in [0, {capacity}] (its row of page_indices), "
            f"got {kv_len}"
        )
    if q_len > kv_len:
        raise ValueError(
            f"kv_lens[{seq}] must count the new tokens too: at least {q_len}, "
            f"got {kv_len}"
        )


def _validate_phase(phase: str, seq: int, q_len: int, expected: int) -> None:
    # A sequence without new tokens is skipped wherever it stands.
    if q_len not in (0, expected):
        raise ValueError(
            f"distribution puts sequence {seq} among the {phase} ones: it must have "
            f"{expected} new tokens by cu_q_lens, got {q_len}"
        )

"""What the operator computes, in plain PyTorch.

Written for clarity: sequence by sequence, everything in float32. A sequence attends to
its keys and values as the cache stores them, quantisation included. CPU tensors take
:mod:`torch_rpa.cpu`, which is tested against this.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from jax_kernels.contract.cache import (
    FUSED_VALUE_LANE,
    QUANTIZED_DTYPES,
    CacheGeometry,
)
from torch_rpa.options import AttentionOptions, dtype_name, torch_dtype
from torch_rpa.validation import Inputs, validate_ranges, validate_static

# Bounds the score matrix: queries are processed in blocks of at most this many rows.
MAX_SCORES = 1 << 24


def ragged_paged_attention_(
    inputs: Inputs, options: AttentionOptions
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Writes new keys and values to ``inputs.kv_cache`` and returns the attention.

    Everything is checked before the first write.

    Returns:
        ``[T, Hq, D]`` in ``options.out_dtype`` or the dtype of ``q``. Rows of no live
        sequence are zeros. With ``options.return_lse`` also the logarithms of the
        denominators, float32 ``[T, Hq]``, minus infinity in those rows.

    Raises:
        ValueError: The arguments do not fit together, or a length or page id is out of
            range.
    """
    sizes = validate_static(inputs, options)
    validate_ranges(inputs, sizes, options)
    geometry, scales = sizes.cache, Scales.of(inputs, options)
    live = inputs.distribution.tolist()[2]
    kv_lens = inputs.kv_lens.tolist()
    cu_q_lens = inputs.cu_q_lens.tolist()
    page_table = inputs.page_indices.reshape(sizes.num_sequences, -1).long()

    out = torch.zeros_like(
        inputs.q,
        dtype=torch_dtype(sizes.out_dtype),
        memory_format=torch.contiguous_format,
    )
    lse = torch.full(out.shape[:2], -torch.inf)
    for seq in range(live):
        start, stop, kv_len = cu_q_lens[seq], cu_q_lens[seq + 1], kv_lens[seq]
        if stop == start:
            continue
        stored = kv_len - (stop - start if options.needs_no_new_tokens else 0)
        pages = page_table[seq, : -(-stored // geometry.page_size)]
        if options.update_kv_cache:
            assert inputs.k is not None and inputs.v is not None
            new = slice(start, stop)
            write_tokens(
                inputs.kv_cache,
                encode(inputs.k[new], inputs.kv_cache.dtype, scales.k),
                encode(inputs.v[new], inputs.kv_cache.dtype, scales.v),
                pages,
                kv_len,
                geometry,
            )
        keys, values = read_tokens(inputs.kv_cache, pages, stored, geometry)
        rows, lse[start:stop] = attend(
            inputs.q[start:stop], keys, values, inputs.sinks, options, kv_len, scales
        )
        out[start:stop] = rows.to(out.dtype)
    return (out, lse) if options.return_lse else out


class Scales(NamedTuple):
    """Scales of a call: numbers, or float32 ``[1 or Hkv, 1]``; None is 1."""

    q: float | torch.Tensor | None = None
    k: float | torch.Tensor | None = None
    v: float | torch.Tensor | None = None

    @classmethod
    def of(cls, inputs: Inputs, options: AttentionOptions) -> Scales:
        """The scales among the tensors, or among the options."""
        return cls(
            *(
                getattr(options, option)
                if getattr(inputs, name) is None
                else getattr(inputs, name).reshape(-1, 1)
                for name, option in (
                    ("q_scales", "q_scale"),
                    ("k_scales", "k_scale"),
                    ("v_scales", "v_scale"),
                )
            )
        )

    def score_factor(self, options: AttentionOptions) -> float | torch.Tensor:
        """The factor of scores: a number, or float32 ``[1 or Hkv, 1, 1]``."""
        factor: float | torch.Tensor = options.score_factor
        for scale in (self.q, self.k):
            if isinstance(scale, torch.Tensor):
                factor = scale[..., None] * factor
        return factor


NO_SCALES = Scales()


def encode_queries(
    q: torch.Tensor, dtype: torch.dtype, scale: float | torch.Tensor | None
) -> torch.Tensor:
    """Returns ``[n, Hq, D]`` as it meets the keys: quantised if there is a scale."""
    if scale is None:
        return q
    if isinstance(scale, torch.Tensor):
        scale = scale.repeat_interleave(q.shape[1] // len(scale), dim=0)
    return encode(q, dtype, scale)


def encode(
    x: torch.Tensor, dtype: torch.dtype, scale: float | torch.Tensor | None
) -> torch.Tensor:
    """Returns ``x * float32(1 / scale)`` as a cache of this dtype stores it.

    The scale may be a tensor that broadcasts. The inverse is rounded to float32 and
    the product computed in it, because compilers differ in how they divide. The product
    is rounded to nearest, ties to even.
    Quantised dtypes are clipped to their finite range first: float8_e4m3fn would turn
    449 into NaN and int8 would wrap.
    """
    if scale is not None:
        inverse = 1.0 / torch.as_tensor(scale, dtype=torch.float64)
        x = x.float() * inverse.float()
    if dtype_name(dtype) not in QUANTIZED_DTYPES:
        return x.to(dtype)
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    clipped = x.float().clamp(limits.min, limits.max)
    return (clipped if dtype.is_floating_point else clipped.round()).to(dtype)


def write_tokens(
    kv_cache: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    kv_len: int,
    geometry: CacheGeometry,
) -> None:
    """Writes the last tokens of one sequence to their slots.

    Args:
        kv_cache: The cache, changed in place.
        keys: ``[n, Hkv, D]`` in the dtype of the cache: positions ``kv_len - n ..``.
        values: Like ``keys``.
        pages: ``[live pages]`` page ids of the sequence.
        kv_len: Tokens of the sequence, the new ones included.
        geometry: Sizes of the cache.
    """
    positions = torch.arange(kv_len - keys.shape[0], kv_len)
    slots = positions % geometry.page_size
    slot_pages = pages[positions // geometry.page_size]
    rows = token_rows(keys, values, geometry)
    by_slot(kv_cache, geometry)[slot_pages, :, slots] = rows


def token_rows(
    keys: torch.Tensor, values: torch.Tensor, geometry: CacheGeometry
) -> torch.Tensor:
    """Returns ``[n, heads_per_page, lanes]``: tokens as they lie in :func:`by_slot`.

    Args:
        keys: ``[n, Hkv, D]`` in the dtype of the cache.
        values: Like ``keys``.
        geometry: Sizes of the cache.
    """
    if keys.dtype.itemsize == 1:
        keys, values = (x.contiguous().view(torch.uint8) for x in (keys, values))
    if geometry.is_fused_kv:
        keys, values = (_wide(x, FUSED_VALUE_LANE) for x in (keys, values))
        return torch.cat([keys, values], dim=-1)
    return _wide(torch.cat([keys, values], dim=1), geometry.lanes)


def _wide(x: torch.Tensor, lanes: int) -> torch.Tensor:
    return x if x.shape[-1] == lanes else F.pad(x, (0, lanes - x.shape[-1]))


def by_slot(kv_cache: torch.Tensor, geometry: CacheGeometry) -> torch.Tensor:
    """Views a cache as ``[N, heads_per_page, page_size, lanes]``.

    Bytes are seen as integers: PyTorch has no indexed float8 stores on the CPU.
    """
    if kv_cache.dtype.itemsize == 1:
        kv_cache = kv_cache.view(torch.uint8)
    return kv_cache.view(
        geometry.num_pages, geometry.heads_per_page, geometry.page_size, geometry.lanes
    )


def read_tokens(
    kv_cache: torch.Tensor, pages: torch.Tensor, kv_len: int, geometry: CacheGeometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads keys and values of one sequence, each ``[Hkv, kv_len, D]``, as stored."""
    rows = by_slot(kv_cache, geometry)[pages].transpose(0, 1)
    rows = rows.reshape(geometry.heads_per_page, -1, geometry.lanes)
    return keys_and_values(rows[:, :kv_len].view(kv_cache.dtype), geometry)


def keys_and_values(
    rows: torch.Tensor, geometry: CacheGeometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits ``[..., heads_per_page, K, lanes]`` in two of ``[..., Hkv, K, D]``."""
    depth, half = geometry.head_dim, FUSED_VALUE_LANE
    if geometry.is_fused_kv:
        return rows[..., :depth], rows[..., half : half + depth]
    heads = geometry.num_kv_heads
    return rows[..., :heads, :, :depth], rows[..., heads:, :, :depth]


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sinks: torch.Tensor | None,
    options: AttentionOptions,
    kv_len: int,
    scales: Scales = NO_SCALES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last ``n`` tokens of one sequence over all of it.

    Args:
        q: ``[n, Hq, D]``, at positions ``kv_len - n .. kv_len``.
        keys: ``[Hkv, kv_len, D]`` as stored; those that no query sees may be missing
            at the end.
        values: Like ``keys``.
        sinks: ``[Hq]`` logits of the extra keys with zero values, or None.
        options: Masks, and factors of scores.
        kv_len: Tokens of the sequence.
        scales: Of queries, keys and values.

    Returns:
        ``[n, Hq, D]`` float32, and the logarithms of the denominators, ``[n, Hq]``.
    """
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[0]
    group = num_heads // num_kv_heads
    q = encode_queries(q, keys.dtype, scales.q)
    keys, values = keys.float(), values.float()
    grouped = q.float().view(num_queries, num_kv_heads, group, head_dim)
    grouped = grouped.permute(1, 2, 0, 3)  # [Hkv, G, n, D]
    score_factor = scales.score_factor(options)
    if isinstance(score_factor, torch.Tensor):
        score_factor = score_factor[..., None]

    block = max(1, MAX_SCORES // (num_heads * kv_len))
    blocks, sums = [], []
    for start in range(0, num_queries, block):
        stop = min(start + block, num_queries)
        positions = torch.arange(start, stop) + kv_len - num_queries
        first, last = visible_range(positions, kv_len, num_queries, options)
        scores = grouped[:, :, start:stop] @ keys[:, None, first:last].mT
        scores = scores * score_factor
        if options.soft_cap is not None:
            scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
        mask = visible(positions[:, None], torch.arange(first, last)[None, :], options)
        scores = scores.masked_fill(~mask, -torch.inf)
        weights, lse = softmax(scores, sinks)
        blocks.append(weights @ values[:, None, first:last])
        sums.append(lse)
    out = torch.cat(blocks, dim=2)
    if isinstance(scales.v, torch.Tensor):
        out = out * scales.v[..., None, None]
    elif scales.v is not None:
        out = out * scales.v
    out = out.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)
    return out, torch.cat(sums, dim=2).permute(2, 0, 1).reshape(num_queries, num_heads)


def visible_range(
    positions: torch.Tensor, kv_len: int, q_len: int, options: AttentionOptions
) -> tuple[int, int]:
    """Returns the smallest range of keys that holds all that any query may see.

    It is that of some queries, of a sequence with ``q_len`` new tokens.
    """
    first, last = 0, kv_len
    if options.sliding_window is not None:
        first = max(0, int(positions[0]) - options.sliding_window + 1)
    if options.causal:
        last = min(last, int(seen_ends(positions[-1:], options)))
    if options.attend == "cache":
        last = min(last, kv_len - q_len)
    elif options.attend == "new":
        first = max(first, kv_len - q_len)
    return min(first, last), last


def seen_ends(q_positions: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """The positions after the last that a causal mask shows to queries."""
    block = options.causal_block or 1
    return (q_positions // block + 1) * block


def visible(
    q_positions: torch.Tensor, k_positions: torch.Tensor, options: AttentionOptions
) -> torch.Tensor:
    """Which queries see which keys of their range, for positions that broadcast."""
    mask = torch.ones(
        torch.broadcast_shapes(q_positions.shape, k_positions.shape), dtype=torch.bool
    )
    if options.causal:
        mask &= k_positions < seen_ends(q_positions, options)
    if options.sliding_window is not None:
        mask &= k_positions > q_positions - options.sliding_window
    return mask


def softmax(
    scores: torch.Tensor, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the last axis of ``[Hkv, G, n, K]``; zeros where nothing is visible.

    And the logarithm of its denominator, ``[Hkv, G, n]``. The sink of a head takes part
    in the sum and has no column of its own. One of +inf takes all the weight.
    """
    peak = scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    if scores.shape[-1]:
        peak = scores.amax(dim=-1, keepdim=True)
    if sinks is not None:
        sink = sinks.float().view(*scores.shape[:2], 1, 1)
        peak = torch.maximum(peak, sink)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)  # (-inf) - (-inf) is NaN
    weights = torch.exp(scores - peak)
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        # inf - inf is NaN
        total = total + torch.exp((sink - peak).masked_fill(sink.isposinf(), 0.0))
    lse = (peak + total.log()).squeeze(-1)
    return weights / total.masked_fill(total == 0.0, 1.0), lse

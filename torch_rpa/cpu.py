"""The operator on CPU tensors: what :mod:`torch_rpa.reference` defines, in few calls.

All new tokens are written at once. Then sequences with one new token and of similar
length attend together, the others one by one, to pages that one copy gathers. Scores
and sums are float32, whatever the dtype of the cache, as in the reference.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from jax_kernels import contract
from jax_kernels.contract import CallSizes, Metadata
from torch_rpa.options import AttentionOptions, torch_dtype
from torch_rpa.reference import (
    MAX_SCORES,
    Scales,
    by_slot,
    encode,
    encode_queries,
    keys_and_values,
    seen_ends,
    token_rows,
    visible,
)
from torch_rpa.validation import Inputs, host_metadata, validate_static

# Sequences attend together while the longest has at most so many times the pages of the
# shortest, or as long as few elements are gathered in vain, beyond the ends of shorter
# ones: a call of its own for the rest takes about as long as this many.
MAX_SPREAD = 2
MAX_WASTE = 1 << 18
# Queries of one sequence that attend at once; a later block sees more keys.
MAX_QUERIES = 1024


@dataclasses.dataclass(frozen=True)
class Part:
    """Sequences that attend together: B with one new token each, or one with n.

    What is gathered of a sequence are ``width`` slots, which hold its tokens in order.

    Attributes:
        tokens: i64 ``[B]`` or ``[n]``, rows of q.
        head_pages: i64 ``[B * heads_per_page * pages]``, what to gather of the cache
            seen as ``[N * heads_per_page, page_size * lanes]``.
        begin: The first slot of the gathered pages that any of the queries sees.
        width: Slots from there on to the last one that any sees.
        dead_slots: ``(sequence, begin, end)`` of the slots within ``width`` that its
            queries do not see; they may hold anything.
        mask: bool ``[B, 1, 1, width]``, the slots that are not dead; None if none is.
        first_position: Position of the first slot, of the first sequence.
    """

    tokens: torch.Tensor
    head_pages: torch.Tensor
    begin: int
    width: int
    dead_slots: tuple[tuple[int, int, int], ...]
    mask: torch.Tensor | None
    first_position: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the numbers of a step say; the same for all layers with one window.

    Attributes:
        num_tokens: The rows of q that belong to sequences.
        slots: i64 ``[num_tokens * heads_per_page]``, where the new tokens go in the
            cache seen as ``[N * heads_per_page * page_size, lanes]``.
        decodes: Parts of sequences with one new token each.
        others: Parts of one sequence each, with more new tokens.
    """

    num_tokens: int
    slots: torch.Tensor
    decodes: tuple[Part, ...]
    others: tuple[Part, ...]


def ragged_paged_attention_(
    inputs: Inputs, options: AttentionOptions
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Does what :func:`torch_rpa.reference.ragged_paged_attention_` does."""
    sizes = validate_static(inputs, options)
    arrays = ((array.tobytes(), array.dtype.str) for array in host_metadata(inputs))
    masks = AttentionOptions(
        causal=options.causal,
        causal_block=options.causal_block,
        sliding_window=options.sliding_window,
        attend=options.attend,
        update_kv_cache=options.update_kv_cache,
        batch_invariant=options.batch_invariant,
    )
    plan = _plan_of_bytes(tuple(arrays), sizes, masks)
    if options.update_kv_cache:
        _write(inputs, plan, sizes, Scales.of(inputs, options))
    out = torch.zeros(inputs.q.shape, dtype=torch_dtype(sizes.out_dtype))
    lse = torch.full(out.shape[:2], -torch.inf) if options.return_lse else None
    if lse is not None and inputs.sinks is not None:
        lse[: plan.num_tokens] = inputs.sinks
    for parts, attend in (
        (plan.decodes, _attend_decodes),
        (plan.others, _attend_one),
    ):
        for part in parts:
            rows, row_lse = attend(inputs, part, sizes, options)
            out.index_copy_(0, part.tokens, rows.to(out.dtype))
            if lse is not None and row_lse is not None:
                lse.index_copy_(0, part.tokens, row_lse)
    return out if lse is None else (out, lse)


# ---- the plan of a step


# By their bytes, since all layers of a model come with the same numbers.
@functools.lru_cache(maxsize=16)
def _plan_of_bytes(
    arrays: tuple[tuple[bytes, str], ...],
    sizes: CallSizes,
    masks: AttentionOptions,
) -> Plan:
    metadata = Metadata(*(np.frombuffer(data, dtype) for data, dtype in arrays))
    return plan_step(metadata, sizes, masks)


def plan_step(metadata: Metadata, sizes: CallSizes, options: AttentionOptions) -> Plan:
    """Finds the slots of new tokens, and which sequences attend together.

    Raises:
        ValueError: A length or page id is out of range.
    """
    contract.check_ranges(metadata, sizes, options)
    page_size, heads = sizes.cache.page_size, sizes.cache.heads_per_page
    live = int(metadata.distribution[2])
    starts = metadata.cu_q_lens[: live + 1].astype(np.int64)
    q_lens, kv_lens = np.diff(starts), metadata.kv_lens[:live].astype(np.int64)
    page_table = metadata.page_indices.reshape(sizes.num_sequences, -1).astype(np.int64)

    sequence = np.repeat(np.arange(live), q_lens)
    tokens = np.arange(len(sequence))
    positions = tokens - starts[sequence] + (kv_lens - q_lens)[sequence]
    column = np.minimum(positions // page_size, page_table.shape[1] - 1)
    head_pages = page_table[sequence, column, None] * heads
    head_pages = head_pages + np.arange(heads)
    slots = head_pages * page_size + positions[:, None] % page_size

    # Queries that attend together: those of a sequence, or each alone.
    owner, first_rows, num_rows = np.arange(live), starts[:-1], q_lens
    if options.batch_invariant:
        owner, first_rows, num_rows = sequence, tokens, np.ones_like(tokens)
    new_start = (kv_lens - q_lens)[owner]
    first_query = new_start + first_rows - starts[owner]
    first_seen = np.zeros_like(first_query)
    seen_end = kv_lens[owner]
    if options.causal:
        block = options.causal_block or 1
        block_end = -(-(first_query + num_rows) // block) * block
        seen_end = np.minimum(block_end, seen_end)
    if options.sliding_window is not None:
        first_seen = np.maximum(first_query + 1 - options.sliding_window, 0)
    if options.attend == "cache":
        seen_end = new_start
    elif options.attend == "new":
        first_seen = np.maximum(first_seen, new_start)
    sees_any = seen_end > first_seen
    num_pages = -(-seen_end // page_size) - first_seen // page_size

    def part(members: np.ndarray, rows: np.ndarray) -> Part:
        table = page_table[owner[members]]
        return _part(rows, table, first_seen[members], seen_end[members], sizes)

    by_size = np.argsort(num_pages, kind="stable")
    decodes = by_size[(sees_any & (num_rows == 1))[by_size]]
    if options.batch_invariant:
        groups: Iterable[np.ndarray] = decodes[:, None]
    else:
        page_elements = heads * page_size * sizes.cache.lanes
        groups = _similar(decodes, num_pages, MAX_WASTE // page_elements)
    return Plan(
        num_tokens=len(tokens),
        slots=torch.from_numpy(slots.reshape(-1)),
        decodes=tuple(part(members, first_rows[members]) for members in groups),
        others=tuple(
            part(np.array([s]), np.arange(starts[s], starts[s + 1]))
            for s in np.flatnonzero(sees_any & (num_rows > 1))
        ),
    )


def _similar(
    ascending: np.ndarray, sizes: np.ndarray, max_waste: int
) -> Iterator[np.ndarray]:
    """Splits indices of ascending sizes where the spread of sizes becomes too large."""
    begin = waste = 0
    for end in range(1, len(ascending) + 1):
        members = ascending[begin:end]
        if end < len(ascending):
            longest, last = sizes[ascending[end]], sizes[ascending[end - 1]]
            waste += int(longest - last) * len(members)
            is_similar = longest <= MAX_SPREAD * sizes[ascending[begin]]
            if is_similar or waste <= max_waste:
                continue
        yield members
        begin, waste = end, 0


def _part(
    tokens: np.ndarray,
    page_table: np.ndarray,  # [B, P]
    first_seen: np.ndarray,  # [B] position of the first token that a query sees
    seen_end: np.ndarray,  # [B] the one after the last
    sizes: CallSizes,
) -> Part:
    page_size, heads = sizes.cache.page_size, sizes.cache.heads_per_page
    first_page = first_seen // page_size
    last_page = (seen_end - 1) // page_size
    columns = first_page[:, None] + np.arange((last_page - first_page).max() + 1)
    # Beyond its last page any page of a sequence will do.
    columns = np.minimum(columns, last_page[:, None])
    pages = np.take_along_axis(page_table, columns, axis=1)
    head_pages = pages[:, None, :] * heads + np.arange(heads)[:, None]

    first_slot, end_slot = (x - first_page * page_size for x in (first_seen, seen_end))
    begin = int(first_slot.min())
    width = int(end_slot.max()) - begin
    alive = np.arange(begin, begin + width) >= first_slot[:, None]
    alive &= np.arange(begin, begin + width) < end_slot[:, None]
    ends = ((0, first - begin) for first in first_slot.tolist())
    dead = [(number, *slots) for number, slots in enumerate(ends)]
    dead += [
        (number, end - begin, width) for number, end in enumerate(end_slot.tolist())
    ]
    return Part(
        tokens=torch.from_numpy(tokens),
        head_pages=torch.from_numpy(head_pages.reshape(-1)),
        begin=begin,
        width=width,
        dead_slots=tuple(slots for slots in dead if slots[1] < slots[2]),
        mask=None if alive.all() else torch.from_numpy(alive)[:, None, None, :],
        first_position=int(first_page[0]) * page_size + begin,
    )


# ---- the cache


def _write(inputs: Inputs, plan: Plan, sizes: CallSizes, scales: Scales) -> None:
    assert inputs.k is not None and inputs.v is not None
    dtype = inputs.kv_cache.dtype
    rows = token_rows(
        encode(inputs.k[: plan.num_tokens], dtype, scales.k),
        encode(inputs.v[: plan.num_tokens], dtype, scales.v),
        sizes.cache,
    )
    slots = by_slot(inputs.kv_cache, sizes.cache).view(-1, sizes.cache.lanes)
    slots.index_copy_(0, plan.slots, rows.view(-1, sizes.cache.lanes))


def _gather(
    kv_cache: torch.Tensor, part: Part, num_sequences: int, sizes: CallSizes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns keys and values of a part, each float32 ``[B, Hkv, width, D]``.

    Slots that are not alive are zeros: the weight zero would not hide a NaN.
    """
    geometry = sizes.cache
    pages = by_slot(kv_cache, geometry).view(-1, geometry.page_size * geometry.lanes)
    rows = pages.index_select(0, part.head_pages)
    rows = rows.view(num_sequences, geometry.heads_per_page, -1, geometry.lanes)
    rows = rows[:, :, part.begin : part.begin + part.width]
    rows = rows.view(kv_cache.dtype).float()
    for sequence, begin, end in part.dead_slots:
        rows[sequence, :, begin:end] = 0.0
    return keys_and_values(rows, geometry)


# ---- attention


def _queries(inputs: Inputs, part: Part, scales: Scales) -> torch.Tensor:
    """Returns the queries of a part, float32 ``[len(tokens), Hq, D]``."""
    q = inputs.q.index_select(0, part.tokens)
    return encode_queries(q, inputs.kv_cache.dtype, scales.q).float()


def _attend_decodes(
    inputs: Inputs, part: Part, sizes: CallSizes, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends with the one new token of each sequence: ``[B, Hq, D]``, ``[B, Hq]``."""
    scales = Scales.of(inputs, options)
    q = _queries(inputs, part, scales)
    grouped = q.view(len(q), sizes.cache.num_kv_heads, -1, q.shape[2])  # [B, Hkv, G, D]
    keys, values = _gather(inputs.kv_cache, part, len(q), sizes)
    sinks = inputs.sinks
    if sinks is not None:
        sinks = sinks.view(1, *grouped.shape[1:3], 1)
    out, lse = _attention(grouped, keys, values, part.mask, sinks, options, scales)
    return out.reshape(q.shape), None if lse is None else lse.reshape(q.shape[:2])


def _attend_one(
    inputs: Inputs, part: Part, sizes: CallSizes, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends with all new tokens of one sequence: ``[n, Hq, D]`` and ``[n, Hq]``."""
    scales = Scales.of(inputs, options)
    q = _queries(inputs, part, scales)
    grouped = q.view(len(q), sizes.cache.num_kv_heads, -1, q.shape[2])
    grouped = grouped.permute(2, 1, 0, 3)  # [G, Hkv, n, D]
    keys, values = _gather(inputs.kv_cache, part, 1, sizes)
    keys, values = (
        x.expand(len(grouped), -1, -1, -1) for x in (keys, values)
    )  # without a copy
    sinks = inputs.sinks
    if sinks is not None:
        sinks = sinks.view(grouped.shape[1], len(grouped), 1, 1).transpose(0, 1)
    block = min(MAX_QUERIES, max(1, MAX_SCORES // (q.shape[1] * part.width)))
    # The last slot is before the queries or that of the last query.
    end = part.first_position + part.width
    first_query = end - (0 if options.attend == "cache" else len(q))
    blocks = []
    for begin, queries in enumerate(grouped.split(block, dim=2)):
        positions = torch.arange(queries.shape[2]) + first_query + begin * block
        first, last = _seen_positions(positions, part, options)
        mask = visible(positions[:, None], torch.arange(first, last)[None, :], options)
        seen = slice(first - part.first_position, last - part.first_position)
        blocks.append(
            _attention(
                queries,
                keys[:, :, seen],
                values[:, :, seen],
                mask,
                sinks,
                options,
                scales,
            )
        )
    outs, sums = zip(*blocks, strict=True)
    out = torch.cat(outs, dim=2).permute(2, 1, 0, 3).reshape(q.shape)
    if not options.return_lse:
        return out, None
    return out, torch.cat(sums, dim=2).permute(2, 1, 0).reshape(q.shape[:2])


def _seen_positions(
    positions: torch.Tensor, part: Part, options: AttentionOptions
) -> tuple[int, int]:
    """Returns the smallest range of a part's tokens with all that some queries see."""
    first, last = part.first_position, part.first_position + part.width
    if options.causal:
        last = min(last, int(seen_ends(positions[-1:], options)))
    if options.sliding_window is not None:
        first = max(first, int(positions[0]) - options.sliding_window + 1)
    return min(first, last), last


def _attention(
    q: torch.Tensor,  # [B, H, R, D]
    keys: torch.Tensor,  # [B, H, K, D]
    values: torch.Tensor,  # [B, H, K, D]
    mask: torch.Tensor | None,  # broadcasts to [B, H, R, K]
    sinks: torch.Tensor | None,  # broadcasts to [B, H, R, 1]
    options: AttentionOptions,
    scales: Scales,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention ``[B, H, R, D]``; with ``return_lse`` its logarithms ``[B, H, R]``.

    H are the key heads.
    """
    if isinstance(scales.v, torch.Tensor):
        values = values * scales.v[..., None]
    elif scales.v is not None:
        values = values * scales.v
    factor = scales.score_factor(options)
    if isinstance(factor, torch.Tensor):
        q, factor = q * factor, 1.0
    # A part of the keys leaves some queries of a window without any.
    is_plain = options.attend != "cache" or options.sliding_window is None
    is_plain &= options.soft_cap is None and sinks is None and not options.return_lse
    if is_plain:
        out = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, scale=factor
        )
        return out, None
    scores = q @ keys.mT * factor
    if options.soft_cap is not None:
        scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    peak = scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    if scores.shape[-1]:
        peak = scores.amax(dim=-1, keepdim=True)
    if sinks is not None:
        peak = torch.maximum(peak, sinks)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)  # (-inf) - (-inf) is NaN
    weights = scores.sub_(peak).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - peak).masked_fill(sinks.isposinf(), 0.0).exp()
    out = (weights @ values) / total.masked_fill(total == 0.0, 1.0)
    return out, (peak + total.log()).squeeze(-1) if options.return_lse else None

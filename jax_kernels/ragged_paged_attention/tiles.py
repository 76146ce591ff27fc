"""One cell of prefill or mixed: a tile of queries meets a block of keys and values.

The tile is cut into sub tiles of ``sub_q`` tokens. The rows of a sub tile are the
G query heads of one key head, each with its ``sub_q`` tokens: row = g * sub_q + t.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_kernels.ragged_paged_attention import (
    masking,
    new_tokens,
    online_softmax,
    refs,
    tile_io,
)
from jax_kernels.ragged_paged_attention.block_loads import (
    largest_divisor,
    load_keys,
    load_values,
    value_words_mask,
)
from jax_kernels.ragged_paged_attention.config import LOG2_E, KernelConfig
from jax_kernels.ragged_paged_attention.dma import Copies
from jax_kernels.ragged_paged_attention.layout import LANES, dtype_packing
from jax_kernels.ragged_paged_attention.online_softmax import SoftmaxState
from jax_kernels.ragged_paged_attention.pipeline import load_cell
from jax_kernels.ragged_paged_attention.schedule import Cell, Int, log2

# Heads whose matmuls and softmaxes are interleaved by the compiler.
INTERLEAVED_HEADS = 4


def process(copies: Copies, slot: Int, tile_slot: Int) -> jax.Array:
    """Computes the cell in a slot; returns whether it was the last of its tile."""
    cell = load_cell(copies.bookkeeping.notes, slot)

    @pl.when((cell.block == 0) & (cell.num_queries > 0))
    def _():
        copies.wait_queries(cell, tile_slot)
        _prepare_queries(copies, cell, tile_slot)
        _init_state(copies, cell)

    copies.wait_block(cell, slot)
    if copies.config.spec.update_kv_cache:

        @pl.when(cell.new_end > cell.new_begin)
        def _():
            copies.wait_new_tokens(cell, slot)
            new_tokens.merge(copies, cell, slot)

        _carry_seam(copies, cell, slot)

        @pl.when(cell.write_row_end > cell.write_row_begin)
        def _():
            copies.start_write_back(cell, slot)

    @pl.when(cell.num_queries > 0)
    def _():
        is_masked = masking.needs_mask(
            cell, copies.schedule.phase.block_kv, copies.config.spec
        )
        lax.cond(
            is_masked,
            lambda: _attend(copies, cell, slot, is_masked=True),
            lambda: _attend(copies, cell, slot, is_masked=False),
        )

    is_last = (cell.num_queries > 0) & (cell.block + 1 >= cell.num_blocks)

    @pl.when(is_last)
    def _():
        copies.wait_output(tile_slot)
        _store_output(copies, cell, tile_slot)
        copies.start_output(tile_slot, cell.query_token, cell.num_queries)

    return is_last


def _live_sub_tiles(copies: Copies, cell: Cell) -> Int:
    sub_q = copies.schedule.phase.sub_q
    return (cell.num_queries + (sub_q - 1)) >> log2(sub_q)


def _prepare_queries(copies: Copies, cell: Cell, slot: Int) -> None:
    """Splits a tile by key head, applies the multiplier and casts, once per tile."""
    config, sub_q = copies.config, copies.schedule.phase.sub_q
    packing = dtype_packing(config.io_dtype)
    source = copies.buffers.queries.at[slot]
    rows = tile_io.WordRows(source, config.interpret)
    stride = source.shape[-3]

    def sub_tile(sub: Int, _) -> None:
        for pair in range(config.num_q_heads // packing):
            words = rows.load(sub * (sub_q * stride) + pair, sub_q, stride)
            for offset, x in enumerate(tile_io.unpack_heads(words, packing)):
                head, member = divmod(pair * packing + offset, config.group)
                place = pl.ds(member * sub_q, sub_q)
                x = tile_io.widen(x, config.lanes)
                copies.buffers.q[sub, head, place, :] = tile_io.prepare_queries(
                    x, config
                )

    lax.fori_loop(0, _live_sub_tiles(copies, cell), sub_tile, None)


def _init_state(copies: Copies, cell: Cell) -> None:
    """No key seen yet; a sink counts as one key with its logit and a zero value."""
    config, buffers = copies.config, copies.buffers
    sub_q = copies.schedule.phase.sub_q

    def sub_tile(sub: Int, _) -> None:
        shape = buffers.m.shape[1:]
        total = 1.0 if config.spec.has_sinks else 0.0
        buffers.m[sub] = jnp.full(shape, online_softmax.NO_KEY_MAX, jnp.float32)
        buffers.l[sub] = jnp.full(shape, total, jnp.float32)
        buffers.acc[sub] = jnp.zeros(buffers.acc.shape[1:], jnp.float32)
        if not config.spec.has_sinks:
            return
        for query_head in range(config.num_q_heads):
            head, member = divmod(query_head, config.group)
            logit = copies.inputs.sinks[query_head] * LOG2_E
            place = pl.ds(member * sub_q, sub_q)
            buffers.m[sub, head, place, :] = jnp.full(
                (sub_q, shape[-1]), logit, jnp.float32
            )

    lax.fori_loop(0, _live_sub_tiles(copies, cell), sub_tile, None)


def _store_output(copies: Copies, cell: Cell, slot: Int) -> None:
    """Normalises a tile and lays it out as ``[tokens, heads, head_dim]``."""
    config, buffers = copies.config, copies.buffers
    sub_q = copies.schedule.phase.sub_q
    packing = dtype_packing(config.out_dtype)
    target = buffers.out.at[slot]
    rows = tile_io.WordRows(target, config.interpret)
    stride = target.shape[-3]

    def sub_tile(sub: Int, _) -> None:
        for head in range(config.num_kv_heads):
            state = _load_state(buffers, sub, head)
            out = online_softmax.normalise(state, config.spec.v_scale)
            buffers.acc[sub, head] = tile_io.value_lanes_first(out, config.cache)
        for pair in range(config.num_q_heads // packing):
            heads = []
            for offset in range(packing):
                head, member = divmod(pair * packing + offset, config.group)
                heads.append(buffers.acc[sub, head, pl.ds(member * sub_q, sub_q), :])
            words = tile_io.pack_heads(heads)[:, : config.io_lanes]
            rows.store(words, sub * (sub_q * stride) + pair, stride)

    lax.fori_loop(0, _live_sub_tiles(copies, cell), sub_tile, None)


def _carry_seam(copies: Copies, cell: Cell, slot: Int) -> None:
    """Keeps the row of old and new tokens for the later tiles of the sequence."""
    seam = copies.buffers.seam
    if seam is None:
        return
    packing = copies.config.cache.packing
    row = (cell.new_start >> log2(packing)) - (cell.block_start >> log2(packing))
    has_seam = (cell.new_start & (packing - 1)) != 0
    in_block = (row >= 0) & (row < copies.schedule.block_rows)
    many_tiles = (cell.num_tiles > 1) & (cell.num_queries > 0)
    row_ref = copies.buffers.kv.at[slot, :, pl.ds(jnp.maximum(row, 0), 1)]

    @pl.when(has_seam & in_block & many_tiles)
    def _():
        @pl.when(cell.tile == 0)
        def _():
            seam[...] = row_ref[...]

        @pl.when(cell.tile > 0)
        def _():
            row_ref[...] = seam[...]


def _load_state(buffers: refs.Buffers, sub: Int, head: Int) -> SoftmaxState:
    return SoftmaxState(
        buffers.m[sub, head], buffers.l[sub, head], buffers.acc[sub, head]
    )


def _attend(copies: Copies, cell: Cell, slot: Int, *, is_masked: bool) -> None:
    """Scores, softmax and values of one cell, for all heads and live sub tiles."""
    config, phase = copies.config, copies.schedule.phase
    interleaved = largest_divisor(config.num_kv_heads, INTERLEAVED_HEADS)
    words_mask = None
    if is_masked:
        words_mask = value_words_mask(
            cell.visible_begin - cell.block_start,
            cell.visible_end - cell.block_start,
            phase.block_kv,
            config,
        )

    def sub_tile(sub: Int, _) -> None:
        mask = _tile_mask(copies, cell, sub) if is_masked else None

        run = functools.partial(_attend_heads, copies, slot, sub, mask, words_mask)
        num_groups = config.num_kv_heads // interleaved
        copies.buffers.scores[...] = _scores(copies, slot, sub, 0, mask)
        lax.fori_loop(
            0, num_groups - 1, lambda i, _: run(i * interleaved, is_last=False), None
        )
        run((num_groups - 1) * interleaved, is_last=True)

    first = jnp.int32(0)
    if config.spec.causal:
        # Sub tiles that end before the block starts see nothing of it.
        ahead = cell.block_start - cell.query_position
        first = jnp.maximum(ahead >> log2(phase.sub_q), 0)
    lax.fori_loop(first, _live_sub_tiles(copies, cell), sub_tile, None)


def _attend_heads(
    copies: Copies,
    slot: Int,
    sub: Int,
    mask: jax.Array | None,
    words_mask: jax.Array | None,
    first: Int,
    *,
    is_last: bool,
) -> None:
    """One softmax tile for each head of a group.

    The source order is the pipeline: the scores of the next head are computed
    before the softmax and the values of the present one, so that the matrix units
    and the vector units have work at the same time. Between groups the scores wait
    in a buffer.
    """
    config, buffers = copies.config, copies.buffers
    num_heads = largest_divisor(config.num_kv_heads, INTERLEAVED_HEADS)
    block_kv = copies.schedule.phase.block_kv
    following = buffers.scores[...]
    for index in range(num_heads):
        head, scores = first + index, following
        if index + 1 < num_heads:
            following = _scores(copies, slot, sub, head + 1, mask)
        elif not is_last:
            buffers.scores[...] = _scores(copies, slot, sub, head + 1, mask)
        state = _load_state(buffers, sub, head)
        p, m, correction = online_softmax.probabilities(scores, state.m)
        v = load_values(buffers.kv.at[slot], head, block_kv, words_mask, config)
        if _sums_in_matrix_unit(config):
            v = online_softmax.with_ones(v)
        buffers.m[sub, head] = m
        buffers.l[sub, head], buffers.acc[sub, head] = online_softmax.accumulate(
            p, v, correction, state.l, state.acc, config.value_dtype
        )


def _sums_in_matrix_unit(config: KernelConfig) -> bool:
    """Whether the matrix units have columns to spare for sums."""
    return config.lanes == LANES and config.value_dtype == jnp.bfloat16


def _scores(
    copies: Copies, slot: Int, sub: Int, head: Int, mask: jax.Array | None
) -> jax.Array:
    """f32[query rows, block_kv] of one head."""
    block_kv = copies.schedule.phase.block_kv
    k = load_keys(copies.buffers.kv.at[slot], head, block_kv, copies.config)
    scores = online_softmax.score_tile(
        copies.buffers.q[sub, head], k, copies.config.spec
    )
    if mask is None:
        return scores
    return jnp.where(mask, scores, online_softmax.MASKED_SCORE)


def _tile_mask(copies: Copies, cell: Cell, sub: Int) -> jax.Array:
    """Visible pairs of one softmax tile; its rows are heads times tokens."""
    config, phase = copies.config, copies.schedule.phase
    num_rows = config.query_rows(phase)
    row = lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0)
    token = row & (phase.sub_q - 1)
    key = lax.broadcasted_iota(jnp.int32, (1, phase.block_kv), 1)
    return masking.attention_mask(
        cell.query_position + sub * phase.sub_q + token,
        cell.block_start + key,
        cell.visible_end,
        config.spec,
    )

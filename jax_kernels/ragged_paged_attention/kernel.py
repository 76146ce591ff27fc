"""The Pallas kernel: one launch that runs a specialised loop for each phase.

Every step of a loop does, for one cell (schedule.py):

    issue    start the DMAs of the cell ``lookahead`` steps ahead
    wait     for this cell's pages, queries and new tokens
    merge    new keys and values into the block
    write    the changed rows back to their pages (awaited when the slot is reused)
    attend   scores, softmax, values
    finish   after the last block of a tile: normalise, send the output
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_kernels.ragged_paged_attention import (
    masking,
    online_softmax,
    refs,
    tile_io,
)
from jax_kernels.ragged_paged_attention.config import (
    LOG2_E,
    KernelConfig,
    Phase,
    PhaseConfig,
)
from jax_kernels.ragged_paged_attention.dma import Copies, OutputClearer
from jax_kernels.ragged_paged_attention.layout import dtype_packing
from jax_kernels.ragged_paged_attention.online_softmax import SoftmaxState
from jax_kernels.ragged_paged_attention.schedule import (
    Cell,
    Cursor,
    Int,
    Lengths,
    Schedule,
    log2,
)

# Heads whose matmuls and softmaxes are interleaved by the compiler.
MAX_INTERLEAVED_HEADS = {Phase.DECODE: 8, Phase.PREFILL: 4, Phase.MIXED: 4}


class Progress(NamedTuple):
    """How far the fetching side is."""

    cursor: Cursor
    num_cells: Int
    num_tiles: Int  # tiles with queries
    stored_end: Int  # see Schedule.describe


def rpa_kernel(
    scalars: refs.ScalarRefs,
    inputs: refs.HbmInputs,
    outputs: refs.HbmOutputs,
    zeros,  # VMEM, refs.zero_rows_shape
    clear_semaphore,
    *,
    config: KernelConfig,
) -> None:
    """Runs every phase, and clears the rows of the output that no sequence owns."""
    num_live = scalars.distribution[2]
    num_live_tokens = jnp.where(num_live > 0, scalars.cu_q_lens[num_live], 0)
    clearer = OutputClearer(config, outputs.out, zeros, clear_semaphore)

    @pl.when(num_live_tokens < config.num_tokens)
    def _():
        zeros[...] = jnp.zeros(zeros.shape, zeros.dtype)
        clearer.start(num_live_tokens)

    for phase in config.phases:
        begin, end = _sequences_of(phase, scalars, config)
        run = functools.partial(
            _run_phase, begin, end, scalars, inputs, outputs, Schedule(config, phase)
        )

        @pl.when(end > begin)
        def _(run=run, phase=phase):
            pl.run_scoped(run, *refs.allocate_phase(config, phase))

    clearer.wait(num_live_tokens)


def _sequences_of(phase: PhaseConfig, scalars, config: KernelConfig):
    """The range of sequences that a phase serves."""
    decode_end, prefill_end, num_live = (scalars.distribution[i] for i in range(3))
    if phase.phase is Phase.DECODE:
        return 0, decode_end
    if phase.phase is Phase.PREFILL:
        return decode_end, prefill_end
    has_prefill = any(other.phase is Phase.PREFILL for other in config.phases)
    # Without a loop of its own, the prefill range is served as mixed.
    return (prefill_end if has_prefill else decode_end), num_live


def _run_phase(
    begin, end, scalars, inputs, outputs, schedule, buffers, bookkeeping, semaphores
):
    """The pipelined loop over the cells of sequences begin .. end."""
    phase = schedule.phase
    copies = Copies(
        schedule, scalars, inputs, outputs, buffers, bookkeeping, semaphores
    )
    copies.reset()
    issue = functools.partial(_issue, copies, end)
    start = Progress(
        Cursor(jnp.int32(begin), jnp.int32(0), jnp.int32(0)),
        num_cells=jnp.int32(0),
        num_tiles=jnp.int32(0),
        stored_end=jnp.int32(0),
    )
    progress = lax.fori_loop(0, phase.lookahead, lambda _, p: issue(p), start)

    def is_unfinished(carry):
        step, _, progress = carry
        return step < progress.num_cells

    def run_step(carry):
        step, tile, progress = carry
        progress = issue(progress)
        tile = _process(copies, step, tile)
        return step + 1, tile, progress

    lax.while_loop(is_unfinished, run_step, (jnp.int32(0), jnp.int32(0), progress))
    copies.drain()


def _issue(copies: Copies, end: Int, progress: Progress) -> Progress:
    """Starts the DMAs of the next cell, if there is one."""
    schedule = copies.schedule
    num_slots = schedule.phase.num_slots

    def start(progress: Progress) -> Progress:
        cursor, stored_end = progress.cursor, progress.stored_end
        lengths = _read_lengths(copies.scalars, cursor.sequence)
        slot = lax.rem(progress.num_cells, jnp.int32(num_slots))
        if copies.config.spec.update_kv_cache:
            stored_end = _stored_end(copies, slot, cursor.sequence, stored_end)
            copies.wait_write_back(slot)
        cell = schedule.describe(cursor, lengths, stored_end)
        _store_cell(copies.bookkeeping.cells, slot, cell)
        if copies.config.spec.update_kv_cache:
            copies.start_new_tokens(cell, slot)
        copies.start_block(cell, slot)
        is_first = _is_first_block(cell)

        @pl.when(is_first)
        def _():
            queries_slot = lax.rem(progress.num_tiles, jnp.int32(num_slots))
            copies.start_queries(cell, queries_slot)

        following = schedule.advance(cell)
        return Progress(
            following,
            progress.num_cells + 1,
            progress.num_tiles + is_first.astype(jnp.int32),
            jnp.where(following.sequence == cursor.sequence, stored_end, 0),
        )

    return lax.cond(
        progress.cursor.sequence < end, start, lambda progress: progress, progress
    )


def _stored_end(copies: Copies, slot: Int, sequence: Int, stored_end: Int) -> Int:
    """How far a sequence is stored once the write-back of a slot has ended."""
    if copies.schedule.phase.is_decode:
        return stored_end  # One new token, met once.
    earlier = _load_cell(copies.bookkeeping.cells, slot)
    has_written = copies.bookkeeping.written_rows[slot] > 0
    return jnp.where(
        has_written & (earlier.sequence == sequence),
        copies.schedule.written_end(earlier),
        stored_end,
    )


def _process(copies: Copies, step: Int, tile: Int) -> Int:
    """Computes one cell; returns the number of tiles finished so far."""
    num_slots = jnp.int32(copies.schedule.phase.num_slots)
    slot, tile_slot = lax.rem(step, num_slots), lax.rem(tile, num_slots)
    cell = _load_cell(copies.bookkeeping.cells, slot)

    @pl.when(_is_first_block(cell))
    def _():
        copies.wait_queries(cell, tile_slot)
        _prepare_queries(copies, cell, tile_slot)
        _init_state(copies, cell)

    copies.wait_block(cell, slot)
    if copies.config.spec.update_kv_cache:

        @pl.when(cell.new_end > cell.new_begin)
        def _():
            copies.wait_new_tokens(cell, slot)
            _merge_new_tokens(copies, cell, slot)

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
        copies.start_output(cell, tile_slot)

    return tile + is_last.astype(jnp.int32)


def _read_lengths(scalars: refs.ScalarRefs, sequence: Int) -> Lengths:
    q_start = scalars.cu_q_lens[sequence]
    return Lengths(
        q_start=q_start,
        q_len=scalars.cu_q_lens[sequence + 1] - q_start,
        kv_len=scalars.kv_lens[sequence],
    )


def _is_first_block(cell: Cell) -> jax.Array:
    return (cell.block == 0) & (cell.num_queries > 0)


def _store_cell(cells_ref, slot: Int, cell: Cell) -> None:
    for index, value in enumerate(cell):
        cells_ref[slot * len(cell) + index] = jnp.asarray(value, jnp.int32)


def _load_cell(cells_ref, slot: Int) -> Cell:
    size = len(Cell._fields)
    return Cell(*(cells_ref[slot * size + index] for index in range(size)))


# Queries in, output out.


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

    def prepare(x: jax.Array) -> jax.Array:
        x = tile_io.widen(x, config.lanes)
        if config.spec.q_scale is None:
            x = x * config.spec.query_multiplier
            x = x.astype(config.multiply_dtype)
        else:
            x = tile_io.quantise(x / config.spec.q_scale, config.multiply_dtype)
        return x.astype(copies.buffers.q.dtype)

    def sub_tile(sub: Int, _) -> None:
        for pair in range(config.num_q_heads // packing):
            words = rows.load(sub * (sub_q * stride) + pair, sub_q, stride)
            for offset, x in enumerate(tile_io.unpack_heads(words, packing)):
                head, member = divmod(pair * packing + offset, config.group)
                place = pl.ds(member * sub_q, sub_q)
                copies.buffers.q[sub, head, place, :] = prepare(x)

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


# New keys and values.


def _merge_new_tokens(copies: Copies, cell: Cell, slot: Int) -> None:
    """Packs new tokens into cache rows and puts them in their place in the block.

    Works on whole registers: chunks of the block of eight packed rows. Slots that
    hold no new token keep what they have.
    """
    config, buffers = copies.config, copies.buffers
    packing = dtype_packing(config.io_dtype)
    chunk_rows, chunk_tokens = config.rows_per_chunk, config.tokens_per_chunk
    stride = buffers.keys.shape[-3]
    keys = tile_io.WordRows(buffers.keys.at[slot], config.interpret)
    values = tile_io.WordRows(buffers.values.at[slot], config.interpret)
    origin = copies.new_tokens_origin(cell)

    def merge_chunk(chunk: Int, _) -> None:
        first_row = chunk * chunk_rows
        first_token = chunk * chunk_tokens
        is_new = masking.live_word_mask(
            cell.block_start + first_token,
            chunk_rows,
            config.cache.packing,
            cell.new_begin,
            cell.new_end,
        )
        for pair in range(config.num_kv_heads // packing):
            start = (first_token - origin) * stride + pair
            key_heads, value_heads = (
                tile_io.unpack_heads(source.load(start, chunk_tokens, stride), packing)
                for source in (keys, values)
            )
            for offset, tokens in enumerate(zip(key_heads, value_heads, strict=True)):
                head = pair * packing + offset
                for part, new in enumerate(tile_io.pack_tokens(*tokens, config)):
                    rows = tile_io.WordRows(
                        buffers.kv.at[slot, part * config.num_kv_heads + head],
                        config.interpret,
                    )
                    old = rows.load(first_row, chunk_rows)
                    rows.store((new & is_new) | (old & ~is_new), first_row)

    begin = cell.new_begin - cell.block_start
    end = cell.new_end - cell.block_start
    shift = log2(chunk_tokens)
    lax.fori_loop(begin >> shift, (end + chunk_tokens - 1) >> shift, merge_chunk, None)


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


# Attention.


def _load_state(buffers: refs.Buffers, sub: Int, head: Int) -> SoftmaxState:
    return SoftmaxState(
        buffers.m[sub, head], buffers.l[sub, head], buffers.acc[sub, head]
    )


def _attend(copies: Copies, cell: Cell, slot: Int, *, is_masked: bool) -> None:
    """Scores, softmax and values of one cell, for all heads and live sub tiles."""
    config, phase = copies.config, copies.schedule.phase
    interleaved = _largest_divisor(
        config.num_kv_heads, MAX_INTERLEAVED_HEADS[phase.phase]
    )
    value_words_mask = None
    if is_masked:
        # Dead slots of V may hold NaN or infinity, which a zero probability does
        # not cancel. Rows before the window were not fetched at all.
        value_words_mask = masking.live_word_mask(
            cell.block_start,
            copies.schedule.block_rows,
            config.cache.packing,
            cell.visible_begin & -config.cache.packing,
            cell.visible_end,
        )

    def sub_tile(sub: Int, _) -> None:
        mask = _tile_mask(copies, cell, sub) if is_masked else None

        def head_group(index: Int, _) -> None:
            heads = [index * interleaved + i for i in range(interleaved)]
            _attend_heads(copies, slot, sub, heads, mask, value_words_mask)

        lax.fori_loop(0, config.num_kv_heads // interleaved, head_group, None)

    first = jnp.int32(0)
    if config.spec.causal and not phase.is_decode:
        # Sub tiles that end before the block starts see nothing of it.
        ahead = cell.block_start - cell.query_position
        first = jnp.maximum(ahead >> log2(phase.sub_q), 0)
    lax.fori_loop(first, _live_sub_tiles(copies, cell), sub_tile, None)


def _attend_heads(copies, slot, sub, heads, mask, value_words_mask) -> None:
    """One softmax tile for each of some heads.

    The source order is the pipeline: the scores of the next heads are computed
    before the softmax and the values of the present one, so that the matrix units
    and the vector units have work at the same time.
    """
    config, buffers = copies.config, copies.buffers
    is_decode = copies.schedule.phase.is_decode
    ahead = len(heads) if is_decode else 1

    def scores_of(head: Int) -> jax.Array:
        k = _load_keys(copies, slot, head)
        q = buffers.q[sub, head].astype(config.multiply_dtype)
        scores = online_softmax.score_tile(q, k, config.spec)
        if mask is not None:
            scores = jnp.where(mask, scores, online_softmax.MASKED_SCORE)
        return scores

    def values_of(head: Int, p: jax.Array, correction: jax.Array) -> None:
        v = _load_values(copies, slot, head, value_words_mask)
        buffers.acc[sub, head] = online_softmax.accumulate(
            p.astype(config.value_dtype), v, correction, buffers.acc[sub, head]
        )

    pending = [scores_of(head) for head in heads[:ahead]]
    weighted = []
    for index, head in enumerate(heads):
        if index + ahead < len(heads):
            pending.append(scores_of(heads[index + ahead]))
        state = _load_state(buffers, sub, head)
        p, correction, state = online_softmax.probabilities(pending.pop(0), state)
        buffers.m[sub, head], buffers.l[sub, head] = state.m, state.l
        weighted.append((head, p, correction))
        if not is_decode:
            values_of(*weighted.pop())
    for head, p, correction in weighted:
        values_of(head, p, correction)


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


def _load_keys(copies: Copies, slot: Int, head: Int) -> jax.Array:
    """[block_kv, lanes]; in a fused cache the lanes past head_dim hold values."""
    config = copies.config
    words = _load_block(copies, slot, head)
    return tile_io.words_to_tokens(words, config.cache.dtype, config.multiply_dtype)


def _load_values(copies: Copies, slot: Int, head: Int, words_mask) -> jax.Array:
    """[block_kv, lanes], with zeros in dead slots."""
    config = copies.config
    first = 0 if config.cache.is_fused_kv else config.num_kv_heads
    words = _load_block(copies, slot, first + head)
    if words_mask is not None:
        words = words & words_mask
    return tile_io.words_to_tokens(words, config.cache.dtype, config.value_dtype)


def _load_block(copies: Copies, slot: Int, head: Int) -> jax.Array:
    rows = tile_io.WordRows(copies.buffers.kv.at[slot, head], copies.config.interpret)
    return rows.load(0, copies.schedule.block_rows)


def _largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, limit + 1) if number % d == 0)

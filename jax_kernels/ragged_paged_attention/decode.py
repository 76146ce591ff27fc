"""One cell of decode: a single query token of a sequence meets a block.

Everything from queries to output is one stretch of code without branches, and the
planning of a later cell is part of it: scalar work, the merge of the new token, the
softmax of some heads and the matmuls of others all run in each other's shadow. What
does not apply to a cell is computed all the same and discarded by a select.

The stretch exists in several sizes, so that a short context does not pay for a long
block, and once more without masks for the blocks in the middle of a long one.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention import (
    masking,
    new_tokens,
    online_softmax,
    tile_io,
)
from jax_kernels.ragged_paged_attention.block_loads import (
    largest_divisor,
    load_keys,
    load_values,
    value_words_mask,
)
from jax_kernels.ragged_paged_attention.config import LOG2_E, SUBLANES
from jax_kernels.ragged_paged_attention.dma import Copies
from jax_kernels.ragged_paged_attention.layout import dtype_packing
from jax_kernels.ragged_paged_attention.online_softmax import SoftmaxState
from jax_kernels.ragged_paged_attention.pipeline import Progress, load_cell
from jax_kernels.ragged_paged_attention.schedule import Cell, Int, log2

# Heads that share one stretch of code; even, since two bf16 heads share a word.
MAX_STRETCH_HEADS = 8
# The smallest stretch, in tokens; each further one is twice as long.
MIN_STRETCH_TOKENS = 256


def prepare(copies: Copies) -> None:
    """Lays out the sinks once per launch, as the maxima that rows start from."""
    config, sinks = copies.config, copies.buffers.sinks
    if sinks is None:
        return
    sinks[...] = jnp.zeros(sinks.shape, jnp.float32)
    for query_head in range(config.num_q_heads):
        head, member = divmod(query_head, config.group)
        logit = copies.inputs.sinks[query_head] * LOG2_E
        sinks[head, pl.ds(member, 1), :] = jnp.full(
            (1, sinks.shape[-1]), logit, jnp.float32
        )


def process(
    copies: Copies,
    slot: Int,
    tile_slot: Int,
    plan: Callable[[], Progress],
) -> tuple[jax.Array, Progress]:
    """Computes the cell in a slot, and plans a later one on the way.

    Returns:
      Whether the cell was the last of its sequence, and the result of ``plan``.
    """
    cell = load_cell(copies.bookkeeping.cells, slot)

    @pl.when((cell.block == 0) & (cell.num_queries > 0))
    def _():
        copies.wait_output(tile_slot)
        copies.wait_queries(cell, tile_slot)

    copies.wait_block(cell, slot)
    if copies.config.spec.update_kv_cache:
        copies.wait_new_tokens(cell, slot)

    is_last = cell.block + 1 >= cell.num_blocks
    stretches = [
        functools.partial(_compute, copies, cell, slot, tile_slot, plan, size, is_edge)
        for size, is_edge in _stretches(copies)
    ]
    # A sequence without a query has no tile slot of its own: that of the next tile
    # may be in the middle of its DMA.
    index = jnp.where(
        cell.num_queries > 0,
        _choose_stretch(copies, cell, is_last),
        len(stretches),
    )
    progress = lax.switch(index, [*stretches, plan])

    @pl.when(cell.write_row_end > cell.write_row_begin)
    def _():
        copies.start_write_back(cell, slot)

    is_done = is_last & (cell.num_queries > 0)

    @pl.when(is_done)
    def _():
        copies.start_output(cell, tile_slot)

    return is_done, progress


def _stretches(copies: Copies) -> list[tuple[int, bool]]:
    """(tokens, whether masked) of each stretch; the last is the unmasked one."""
    block_kv = copies.schedule.phase.block_kv
    sizes = [min(MIN_STRETCH_TOKENS, block_kv)]
    while sizes[-1] < block_kv:
        sizes.append(2 * sizes[-1])
    return [(size, True) for size in sizes] + [(block_kv, False)]


def _choose_stretch(copies: Copies, cell: Cell, is_last: jax.Array) -> jax.Array:
    """Index of the stretch for a cell.

    The last block of a sequence takes a masked one even when it is full: only those
    merge the new token and store the output.
    """
    stretches = _stretches(copies)
    extent = cell.visible_end - cell.block_start
    size_index = sum(
        (extent > size).astype(jnp.int32) for size, _ in stretches[:-2]
    ) + jnp.int32(0)
    is_edge = is_last | masking.needs_mask(
        cell, copies.schedule.phase.block_kv, copies.config.spec
    )
    return jnp.where(is_edge, size_index, len(stretches) - 1)


def _compute(
    copies: Copies,
    cell: Cell,
    slot: Int,
    tile_slot: Int,
    plan: Callable[[], Progress],
    size: int,
    is_edge: bool,
) -> Progress:
    """One stretch: ``size`` tokens of every head."""
    config = copies.config
    group_heads = _heads_per_stretch(copies)
    num_groups = config.num_kv_heads // group_heads
    mask = words_mask = None
    if is_edge:
        mask = _token_mask(copies, cell, size)
        words_mask = value_words_mask(copies, cell, size)

    def attend(index: Int):
        heads = [index * group_heads + i for i in range(group_heads)]
        states = _attend(copies, cell, slot, tile_slot, heads, size, mask, words_mask)
        return heads, states

    def store(heads, states) -> None:
        for head, state in zip(heads, states, strict=True):
            _store_state(copies, head, state)
        if is_edge:
            _store_output(copies, tile_slot, heads, states)

    if num_groups > 1:
        lax.fori_loop(0, num_groups - 1, lambda i, _: store(*attend(i)), None)
    heads, states = attend(num_groups - 1)
    # The last products are still on their way out of the matrix units: scalar work
    # fills the wait.
    progress = plan()
    store(heads, states)
    return progress


def _heads_per_stretch(copies: Copies) -> int:
    """The most heads, up to a limit, whose word rows are not shared with others."""
    config = copies.config
    packing = max(dtype_packing(config.io_dtype), dtype_packing(config.out_dtype))
    if config.num_kv_heads % packing:
        # Then key heads have words of their own, and the G query heads of one have.
        packing = 1
    return packing * largest_divisor(
        config.num_kv_heads // packing, MAX_STRETCH_HEADS // packing
    )


def _token_mask(copies: Copies, cell: Cell, size: int) -> jax.Array:
    """bool[1, size]: the tokens of the block that the query sees."""
    key = lax.broadcasted_iota(jnp.int32, (1, size), 1)
    return masking.attention_mask(
        cell.query_position,
        cell.block_start + key,
        cell.visible_end,
        copies.config.spec,
    )


def _merge_new_token(copies: Copies, cell: Cell, slot: Int, pair: Int) -> None:
    """Merges the new token if it lies in this block; otherwise changes nothing."""
    chunk = (cell.new_begin - cell.block_start) >> log2(copies.config.tokens_per_chunk)
    last = copies.schedule.block_rows // copies.config.rows_per_chunk - 1
    new_tokens.merge_chunk(copies, cell, slot, jnp.clip(chunk, 0, last), [pair])


def _load_query(copies: Copies, tile_slot: Int, head: Int, parity: int) -> jax.Array:
    """[query rows, lanes] of one key head: multiplied and cast.

    The rows past its G heads belong to other heads or to nobody. Rows never mix, so
    they are computed and ignored.

    Args:
      parity: Where the first head sits in its word row, known at compile time.
    """
    config = copies.config
    packing = dtype_packing(config.io_dtype)
    num_rows = config.query_rows(copies.schedule.phase)
    rows = tile_io.WordRows(copies.buffers.queries.at[tile_slot], config.interpret)
    first = (head * config.group) >> log2(packing)
    if packing == 1:
        x = pltpu.bitcast(rows.load(first, num_rows), jnp.float32)
    else:
        words = rows.load(first, num_rows // packing + (SUBLANES if parity else 0))
        x = pltpu.bitcast(words, jnp.bfloat16).astype(jnp.float32)
        x = x[parity : parity + num_rows]
    return tile_io.prepare_queries(tile_io.widen(x, config.lanes), config)


def _attend(copies, cell, slot, tile_slot, heads, size, mask, words_mask):
    """Scores of all heads, then their softmaxes, then their values.

    The order matters: head by head, the matrix units wait for every softmax.
    """
    config = copies.config
    packing = dtype_packing(config.io_dtype)
    is_first = cell.block == 0
    merges = mask is not None and config.spec.update_kv_cache

    scores = []
    for offset, head in enumerate(heads):
        if merges and offset % packing == 0:
            # Just before its head, so that the matrix units start at once.
            pair = (heads[0] >> log2(packing)) + offset // packing
            _merge_new_token(copies, cell, slot, pair)
        q = _load_query(copies, tile_slot, head, (offset * config.group) % packing)
        k = load_keys(copies, slot, head, size)
        s = online_softmax.score_tile(q, k, config.spec)
        if mask is not None:
            s = jnp.where(mask, s, online_softmax.MASKED_SCORE)
        scores.append(s)

    weighted = []
    for head, s in zip(heads, scores, strict=True):
        state = _load_state(copies, head, is_first)
        p, m, correction = online_softmax.probabilities(s, state.m)
        weighted.append((p, correction, state._replace(m=m)))

    states = []
    for head, (p, correction, state) in zip(heads, weighted, strict=True):
        v = load_values(copies, slot, head, words_mask, size)
        sums = online_softmax.accumulate(
            p, v, correction, state.l, state.acc, config.value_dtype
        )
        states.append(SoftmaxState(state.m, *sums))
    return states


def _load_state(copies: Copies, head: Int, is_first: jax.Array) -> SoftmaxState:
    """The state of a head, or the one to start from."""
    buffers, sinks = copies.buffers, copies.buffers.sinks
    # A sink counts as one key with its logit and a zero value.
    start_m = online_softmax.NO_KEY_MAX if sinks is None else sinks[head]
    start_l = 0.0 if sinks is None else 1.0
    return SoftmaxState(
        m=jnp.where(is_first, start_m, buffers.m[0, head]),
        l=jnp.where(is_first, start_l, buffers.l[0, head]),
        acc=jnp.where(is_first, 0.0, buffers.acc[0, head]),
    )


def _store_state(copies: Copies, head: Int, state: SoftmaxState) -> None:
    buffers = copies.buffers
    buffers.m[0, head], buffers.l[0, head] = state.m, state.l
    buffers.acc[0, head] = state.acc


def _store_output(copies: Copies, tile_slot: Int, heads, states) -> None:
    """Normalises, and lays the heads out as the output array has them."""
    config, buffers = copies.config, copies.buffers
    packing = dtype_packing(config.out_dtype)
    rows = tile_io.WordRows(buffers.out.at[tile_slot], config.interpret)
    outs = [
        tile_io.value_lanes_first(
            online_softmax.normalise(state, config.spec.v_scale), config.cache
        )[:, : config.io_lanes]
        for state in states
    ]
    group = config.group
    if group % packing == 0:
        for head, out in zip(heads, outs, strict=True):
            words = tile_io.pack_rows(out, packing)[: group // packing]
            rows.store(words, head * (group // packing))
        return
    # A word row holds heads of two key heads.
    members = [out[g : g + 1] for out in outs for g in range(group)]
    first = (heads[0] * group) >> log2(packing)
    for index in range(len(members) // packing):
        pair = members[index * packing : (index + 1) * packing]
        rows.store(tile_io.pack_heads(pair), first + index)

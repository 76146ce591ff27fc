"""Prefill with float8 probabilities: blocks are added to sums that wait for them.

A float8 probability may be too large for its anchor much sooner than a sum of others.
It is NaN then, and so are the sums of its row. So the sums of the last block are kept
apart, as *pending*, until the next block comes. ``recover`` computes those that are
lost once more, and gives the row a higher anchor.

Anchors are found before the first block. They lack ``exponent_multiplier``.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.config import SUBLANES
from jax_kernels.ragged_paged_attention.kernel import ints, online_softmax
from jax_kernels.ragged_paged_attention.kernel.block_loads import (
    value_words_mask,
)
from jax_kernels.ragged_paged_attention.kernel.online_softmax import SoftmaxState
from jax_kernels.ragged_paged_attention.kernel.schedule import Cell, Int
from jax_kernels.ragged_paged_attention.kernel.tiles import parts, softmax_tiles
from jax_kernels.ragged_paged_attention.kernel.tiles.buffers import (
    TileContext,
    chunk_tokens,
)
from jax_kernels.ragged_paged_attention.kernel.tiles.softmax_tiles import (
    SoftmaxTile,
    Tokens,
)
from jax_kernels.ragged_paged_attention.layout import LANES


class Pending(NamedTuple):
    """Sums of some query rows over their last block."""

    l: jax.Array  # noqa: E741  f32[rows, 128], see ``Numerics.sums_are_parts``
    acc: jax.Array  # f32[rows, lanes]


class Mask(NamedTuple):
    """Bits of some tokens that take part."""

    words: jax.Array  # of their values, as in ``block_loads.load_values``
    pairs: jax.Array  # u32[rows // 4, tokens], of probabilities


def is_used(context: TileContext) -> bool:
    return context.config.numerics.float8_probabilities is not None


def start(context: TileContext, cell: Cell, slot: Int) -> None:
    """Starts the rows of a tile, with an anchor for each that sees a first key."""
    config = context.config
    keys = min(online_softmax.ANCHOR_KEYS, context.phase.block_kv)
    tokens = Tokens(0, keys)
    for softmax_tile in softmax_tiles.tiles_of_heads(context, 0, config.num_kv_heads):
        state = softmax_tiles.start_state(context, softmax_tile)
        scores = softmax_tiles.scores(context, slot, tokens, softmax_tile)
        is_seen = softmax_tiles.visible_pairs(context, cell, tokens, softmax_tile)
        scores = jnp.where(is_seen, scores, online_softmax.MASKED_SCORE)
        m = online_softmax.anchor(scores, state.m) - online_softmax.FLOAT8_DOUBLINGS
        l = state.l  # noqa: E741
        if config.spec.has_sinks:
            l = l * jnp.exp2(state.m - m)  # noqa: E741
        context.buffers.m[softmax_tiles.state_index(context, softmax_tile)] = m * (
            1.0 / config.numerics.exponent_multiplier
        )
        l = online_softmax.part_sum(l, config.numerics)  # noqa: E741
        context.buffers.pending_l[softmax_tiles.state_index(context, softmax_tile)] = l


def attend_block(context: TileContext, cell: Cell, slot: Int) -> jax.Array:
    """A block that every query sees.

    Returns:
      f32[8, 128]: what is finite if no row has to be served again.
    """
    tokens = Tokens(0, context.phase.block_kv)

    def update(softmax_tile: SoftmaxTile) -> Pending:
        _sum_pending(context, softmax_tile, cell)
        scores = _scores(context, slot, tokens, softmax_tile)
        return _add(context, slot, softmax_tile, tokens, scores, None)

    return _for_all_tiles(context, update)


def attend_chunks(context: TileContext, cell: Cell, slot: Int) -> jax.Array:
    """The part of a block that some query sees, in chunks with masks.

    Returns what ``attend_block`` does.
    """
    config, block_kv = context.config, context.phase.block_kv
    size = chunk_tokens(context.phase)
    end = cell.visible_end - cell.block_start
    # Queries without any key need a state all the same.
    num_chunks = ints.maximum(ints.ceil_div(ints.minimum(end, block_kv), size), 1)

    def sum_pending_of_head(head: Int, _) -> None:
        for softmax_tile in softmax_tiles.tiles_of_heads(context, head, 1):
            _sum_pending(context, softmax_tile, cell)

    def attend_chunk(index: Int, sums: jax.Array) -> jax.Array:
        tokens = Tokens(index * size, size)
        words_mask = value_words_mask(0, end - tokens.first, size, config)
        bits = _visible_bits(context, cell, tokens)

        def update(softmax_tile: SoftmaxTile) -> Pending:
            scores = _scores(context, slot, tokens, softmax_tile)
            mask = Mask(words_mask, bits[softmax_tile.first_row])
            new = _add(context, slot, softmax_tile, tokens, scores, mask)
            old = _load_pending(context, softmax_tile)
            return Pending(
                *(
                    sums + ints.where(index == 0, 0.0, earlier)
                    for sums, earlier in zip(new, old, strict=True)
                )
            )

        return sums + _for_all_tiles(context, update)

    lax.fori_loop(0, config.num_kv_heads, sum_pending_of_head, None)
    return lax.fori_loop(0, num_chunks, attend_chunk, softmax_tiles.no_sums())


def recover(context: TileContext, cell: Cell, slot: Int) -> None:
    """Serves the rows whose pending sums were lost, with the running maximum.

    Their maximum becomes their anchor.
    """
    softmax_tiles.recover_pieces(
        context, functools.partial(_recover, context, cell, slot)
    )


def final_state(context: TileContext, softmax_tile: SoftmaxTile) -> SoftmaxState:
    """The state of a softmax tile after the last block of its tile."""
    state = softmax_tiles.load_state(context, softmax_tile)
    pending = _load_pending(context, softmax_tile)
    l = online_softmax.whole_sum(  # noqa: E741
        state.l + pending.l, context.config.numerics
    )
    return SoftmaxState(state.m, l, state.acc + pending.acc)


def _scores(
    context: TileContext, slot: Int, tokens: Tokens, softmax_tile: SoftmaxTile
) -> jax.Array:
    """f32[rows, tokens] without ``exponent_multiplier``, not masked."""
    is_folded = context.config.numerics.exponent_multiplier != 1.0
    compute = softmax_tiles.products if is_folded else softmax_tiles.scores
    return compute(context, slot, tokens, softmax_tile)


def _sum_pending(context: TileContext, softmax_tile: SoftmaxTile, cell: Cell) -> None:
    """Adds what is pending of the block before to the sums.

    Before a first block nothing is pending but what a sink has in the denominator, and
    there are no sums.
    """
    state = softmax_tiles.load_state(context, softmax_tile)
    pending = _load_pending(context, softmax_tile)
    buffers, index = context.buffers, softmax_tiles.state_index(context, softmax_tile)
    is_first = cell.block == 0
    # The compiler makes loads with a mask of this.
    before, new = (ints.where(is_first, 0.0, acc) for acc in (state.acc, pending.acc))
    buffers.l[index] = ints.where(is_first, 0.0, state.l) + pending.l
    buffers.acc[index] = before + new


def _visible_bits(context: TileContext, cell: Cell, tokens: Tokens) -> dict:
    """``Mask.pairs`` of the softmax tiles of a key head, by their first row."""
    packing, by_token = 4, {}

    def bits(softmax_tile: SoftmaxTile) -> jax.Array:
        word = lax.broadcasted_iota(jnp.int32, (softmax_tile.num_rows // packing, 1), 0)
        words = jnp.zeros((word.shape[0], tokens.number), jnp.uint32)
        for place in range(packing):
            row = softmax_tile.first_row + packing * word + place
            token = parts.token_of_row(context, row)
            is_seen = softmax_tiles.is_visible(context, cell, tokens, token)
            ones = jnp.uint32(0xFF << 8 * place)
            words |= jnp.where(is_seen, ones, jnp.uint32(0))
        return words

    result = {}
    for softmax_tile in softmax_tiles.tiles_of_heads(context, 0, 1):
        # Query heads see the same.
        token = softmax_tile.first_row & (context.phase.block_q - 1)
        if token not in by_token:
            by_token[token] = bits(softmax_tile)
        result[softmax_tile.first_row] = by_token[token]
    return result


def _add(
    context: TileContext,
    slot: Int,
    softmax_tile: SoftmaxTile,
    tokens: Tokens,
    scores: jax.Array,
    mask: Mask | None,
) -> Pending:
    """The sums of a softmax tile over some tokens alone.

    Args:
      context: Of the phase.
      slot: Of the keys and values of the cell.
      softmax_tile: The softmax tile.
      tokens: The tokens.
      scores: f32[rows, tokens], as ``_scores`` gives them.
      mask: If some query does not see all of them.
    """
    config = context.config
    anchors = context.buffers.m[softmax_tiles.state_index(context, softmax_tile)]
    p = online_softmax.float8_probabilities_at(scores, anchors, config.numerics)
    if mask is not None:
        # Whatever stood there, NaN too, is gone.
        p = pltpu.bitcast(pltpu.bitcast(p, jnp.uint32) & mask.pairs, p.dtype)
    v = softmax_tiles.values(
        context, slot, softmax_tile.head, tokens, mask and mask.words, p.dtype
    )
    l, acc = online_softmax.sum_and_weigh(p, v, config.lanes, p.dtype)  # noqa: E741
    return Pending(l, acc)


def _recover(
    context: TileContext, cell: Cell, slot: Int, softmax_tile: SoftmaxTile
) -> None:
    """Serves the lost rows of one softmax tile."""
    config, numerics = context.config, context.config.numerics
    block = Tokens(0, context.phase.block_kv)
    state = softmax_tiles.load_state(context, softmax_tile)
    pending = _load_pending(context, softmax_tile)
    pending_sum = online_softmax.whole_sum(pending.l, numerics)
    is_lost = online_softmax.is_lost(pending_sum)

    def where_lost(new: jax.Array | float, old: jax.Array) -> jax.Array:
        return jnp.where(online_softmax.across(is_lost, old.shape[1]) > 0.0, new, old)

    scores = softmax_tiles.scores_of_lost_rows(
        context, cell, slot, softmax_tile, is_lost
    )
    words_mask = value_words_mask(
        0, cell.visible_end - cell.block_start, block.number, config
    )
    p, m, correction = online_softmax.probabilities(
        scores, state.m * numerics.exponent_multiplier
    )
    l, acc = online_softmax.accumulate(  # noqa: E741
        p,
        softmax_tiles.values(context, slot, softmax_tile.head, block, words_mask),
        correction,
        where_lost(0.0, pending_sum),
        where_lost(0.0, pending.acc),
        numerics.value_dtype,
    )
    l = online_softmax.part_sum(l, numerics)  # noqa: E741
    doublings = is_lost * online_softmax.FLOAT8_DOUBLINGS
    factor = jnp.exp2(doublings)
    rescaled = SoftmaxState(
        where_lost((m - doublings) * (1.0 / numerics.exponent_multiplier), state.m),
        state.l * correction * factor,
        state.acc * online_softmax.across(correction * factor, state.acc.shape[1]),
    )
    softmax_tiles.store_state(context, softmax_tile, rescaled)
    acc = acc * online_softmax.across(factor, acc.shape[1])
    _store_pending(context, softmax_tile, Pending(l * factor, acc))


def _for_all_tiles(
    context: TileContext, update: Callable[[SoftmaxTile], Pending]
) -> jax.Array:
    """Makes what ``update`` returns pending, and gives f32[8, 128], the sum of sums."""
    heads_of_round = softmax_tiles.round_heads(context)

    def run_round(index: Int, sums: jax.Array) -> jax.Array:
        first_head = index * heads_of_round
        for softmax_tile in softmax_tiles.tiles_of_heads(
            context, first_head, heads_of_round
        ):
            pending = update(softmax_tile)
            _store_pending(context, softmax_tile, pending)
            sums += pending.l.reshape(-1, SUBLANES, LANES).sum(axis=0)
        return sums

    num_rounds = context.config.num_kv_heads // heads_of_round
    return lax.fori_loop(0, num_rounds, run_round, softmax_tiles.no_sums())


def _load_pending(context: TileContext, softmax_tile: SoftmaxTile) -> Pending:
    buffers, index = context.buffers, softmax_tiles.state_index(context, softmax_tile)
    return Pending(buffers.pending_l[index], buffers.pending_acc[index])


def _store_pending(
    context: TileContext, softmax_tile: SoftmaxTile, pending: Pending
) -> None:
    buffers, index = context.buffers, softmax_tiles.state_index(context, softmax_tile)
    buffers.pending_l[index] = jnp.broadcast_to(
        pending.l, (softmax_tile.num_rows, LANES)
    )
    buffers.pending_acc[index] = pending.acc

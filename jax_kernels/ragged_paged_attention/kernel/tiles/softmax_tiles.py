"""The query rows that go through the softmax together: their scores and their state.

A tile has *query rows*: those of a key head are its G query heads, each with its
``block_q`` tokens, row = g * block_q + t. A *softmax tile* is some of them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from jax_kernels.ragged_paged_attention.config import SUBLANES
from jax_kernels.ragged_paged_attention.kernel import masking, online_softmax
from jax_kernels.ragged_paged_attention.kernel.block_loads import (
    largest_divisor,
    load_keys,
    load_values,
)
from jax_kernels.ragged_paged_attention.kernel.online_softmax import SoftmaxState
from jax_kernels.ragged_paged_attention.kernel.schedule import Cell, Int, log2
from jax_kernels.ragged_paged_attention.kernel.tiles.buffers import TileContext
from jax_kernels.ragged_paged_attention.layout import LANES

# Softmax tiles in one stretch of code, within which the compiler overlaps them.
MAX_STRETCH_TILES = 16
# The same in float32, whose products take several times as much code.
MAX_F32_STRETCH_TILES = 4
# Query rows that are recovered at a time.
MAX_RECOVERY_ROWS = 128


class SoftmaxTile(NamedTuple):
    """Some query rows of one key head."""

    head: Int
    first_row: Int
    num_rows: int


class Tokens(NamedTuple):
    """Some tokens of a block, from a whole register of packed rows on."""

    first: Int
    number: int


def tiles_of_heads(
    context: TileContext, first_head: Int, num_heads: int
) -> list[SoftmaxTile]:
    """The softmax tiles of some key heads."""
    num_rows = context.config.softmax_rows(context.phase)
    return [
        SoftmaxTile(first_head + offset, first_row, num_rows)
        for offset in range(num_heads)
        for first_row in range(0, context.config.query_rows(context.phase), num_rows)
    ]


def round_heads(context: TileContext) -> int:
    """Key heads whose softmax tiles are in one stretch of code."""
    config = context.config
    is_f32 = config.numerics.value_dtype == jnp.float32
    most_tiles = MAX_F32_STRETCH_TILES if is_f32 else MAX_STRETCH_TILES
    tiles_per_head = len(tiles_of_heads(context, 0, 1))
    return largest_divisor(config.num_kv_heads, max(most_tiles // tiles_per_head, 1))


def no_sums() -> jax.Array:
    """f32[8, 128]: the sums of no rows, to which those of softmax tiles are added."""
    return jnp.zeros((SUBLANES, LANES), jnp.float32)


def recover_pieces(
    context: TileContext, recover: Callable[[SoftmaxTile], None]
) -> None:
    """Calls a function with all query rows, few at a time."""
    config = context.config
    num_rows = math.gcd(config.query_rows(context.phase), MAX_RECOVERY_ROWS)
    pieces = config.query_rows(context.phase) // num_rows

    def piece(index: Int, _) -> None:
        head = lax.div(index, jnp.int32(pieces))
        first_row = pl.multiple_of((index - head * pieces) * num_rows, num_rows)
        recover(SoftmaxTile(head, first_row, num_rows))

    lax.fori_loop(0, config.num_kv_heads * pieces, piece, None)


def scores_of_lost_rows(
    context: TileContext,
    cell: Cell,
    slot: Int,
    softmax_tile: SoftmaxTile,
    is_lost: jax.Array,
) -> jax.Array:
    """f32[rows, block_kv], masked; no row sees anything but those that were lost.

    ``is_lost`` is as ``online_softmax.is_lost`` gives it.
    """
    block = Tokens(0, context.phase.block_kv)
    takes_part = visible_pairs(context, cell, block, softmax_tile)
    takes_part &= online_softmax.across(is_lost, block.number) > 0.0
    return jnp.where(
        takes_part,
        scores(context, slot, block, softmax_tile),
        online_softmax.MASKED_SCORE,
    )


def scores(
    context: TileContext, slot: Int, tokens: Tokens, softmax_tile: SoftmaxTile
) -> jax.Array:
    """f32[rows, tokens], not masked."""
    return online_softmax.finish_scores(
        products(context, slot, tokens, softmax_tile), context.config.numerics
    )


def products(
    context: TileContext, slot: Int, tokens: Tokens, softmax_tile: SoftmaxTile
) -> jax.Array:
    """f32[rows, tokens]: of queries and keys, nothing more."""
    config = context.config
    _, head, rows = state_index(softmax_tile)
    return online_softmax.products(
        context.buffers.q[head, rows],
        load_keys(
            context.rings.kv.at[slot],
            head,
            tokens.number,
            config,
            few_queries=False,
            first_row=_first_row(context, tokens),
        ),
    )


def waiting_scores(context: TileContext, tokens: Tokens) -> jax.Array:
    """f32[rows, tokens]: what ``store_waiting_scores`` kept, of whole chunks."""
    waiting = context.buffers.waiting
    size = waiting.shape[-1]
    first = tokens.first >> log2(size)
    chunks = [waiting[first + index] for index in range(tokens.number // size)]
    return jnp.concatenate(chunks, axis=1)


def store_waiting_scores(context: TileContext, scores: jax.Array) -> None:
    """Keeps the scores of a softmax tile with a whole block, not masked."""
    waiting = context.buffers.waiting
    chunks, _, size = waiting.shape
    for index in range(chunks):
        waiting[index] = scores[:, index * size : (index + 1) * size]


def values(
    context: TileContext,
    slot: Int,
    head: Int,
    tokens: Tokens,
    words_mask: jax.Array | None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """[tokens, lanes], with columns of ones behind them where those give the sums.

    Arguments are as in ``block_loads.load_values``.
    """
    v = load_values(
        context.rings.kv.at[slot],
        head,
        tokens.number,
        words_mask,
        context.config,
        few_queries=False,
        first_row=_first_row(context, tokens),
        dtype=dtype,
    )
    is_summed = context.config.numerics.sums_in_matrix_unit
    return online_softmax.with_ones(v) if is_summed else v


def start_state(context: TileContext, softmax_tile: SoftmaxTile) -> SoftmaxState:
    """The state of rows that have seen no key."""
    config, num_rows = context.config, softmax_tile.num_rows

    def filled(value: float, lanes: int = LANES) -> jax.Array:
        return jnp.full((num_rows, lanes), value, jnp.float32)

    acc = filled(0.0, config.lanes)
    if not config.spec.has_sinks:
        return SoftmaxState(filled(online_softmax.NO_KEY_MAX), filled(0.0), acc)
    return SoftmaxState(_sink_logits(context, softmax_tile), filled(1.0), acc)


def load_state(context: TileContext, softmax_tile: SoftmaxTile) -> SoftmaxState:
    buffers, index = context.buffers, state_index(softmax_tile)
    return SoftmaxState(buffers.m[index], buffers.l[index], buffers.acc[index])


def store_state(
    context: TileContext, softmax_tile: SoftmaxTile, state: SoftmaxState
) -> None:
    buffers, index = context.buffers, state_index(softmax_tile)
    buffers.m[index], buffers.l[index], buffers.acc[index] = state


def visible_pairs(
    context: TileContext, cell: Cell, tokens: Tokens, softmax_tile: SoftmaxTile
) -> jax.Array:
    """bool[rows, tokens]: which query sees which key.

    Rows without a query see what the last query sees, so that they meet no dead key.
    """
    row = lax.broadcasted_iota(jnp.int32, (softmax_tile.num_rows, 1), 0)
    token = (row + softmax_tile.first_row) & (context.phase.block_q - 1)
    return is_visible(context, cell, tokens, token)


def store_visible_bits(context: TileContext, cell: Cell, tokens: Tokens) -> None:
    """Keeps which query of a tile sees which of some tokens, as bits of its words.

    They are the same for all heads.
    """
    visible = context.buffers.visible
    num_words = visible.shape[0]
    packing = context.phase.block_q // num_words
    word = lax.broadcasted_iota(jnp.int32, (num_words, 1), 0)
    bits = jnp.zeros(visible.shape, jnp.uint32)
    for place in range(packing):
        ones = jnp.uint32((2 ** (32 // packing) - 1) << (place * 32 // packing))
        is_seen = is_visible(context, cell, tokens, word * packing + place)
        bits |= jnp.where(is_seen, ones, jnp.uint32(0))
    visible[...] = bits


def visible_bits(context: TileContext, softmax_tile: SoftmaxTile) -> jax.Array:
    """u32[rows // packing, tokens]: those that are kept, for the rows of a tile."""
    visible, block_q = context.buffers.visible, context.phase.block_q
    packing = block_q // visible.shape[0]
    pieces = [
        visible[pl.ds((row & (block_q - 1)) // packing, number // packing)]
        for row, number in _pieces(softmax_tile, block_q)
    ]
    return jnp.concatenate(pieces)


def is_visible(
    context: TileContext, cell: Cell, tokens: Tokens, token: jax.Array
) -> jax.Array:
    """bool[n, tokens] for i32[n, 1], numbers of queries in the tile."""
    key = lax.broadcasted_iota(jnp.int32, (1, tokens.number), 1)
    return masking.attention_mask(
        cell.query_position + jnp.minimum(token, cell.num_queries - 1),
        cell.block_start + tokens.first + key,
        cell.visible_end,
        cell.new_start,
        context.config.spec,
    )


def state_index(softmax_tile: SoftmaxTile):
    """Index of a softmax tile in the state."""
    head, first_row, num_rows = softmax_tile
    return 0, head, pl.ds(first_row, num_rows)


def _first_row(context: TileContext, tokens: Tokens) -> Int:
    """The packed row of the first token."""
    row = tokens.first >> log2(context.config.cache.packing)
    return row if isinstance(row, int) else pl.multiple_of(row, 8)


def _sink_logits(context: TileContext, softmax_tile: SoftmaxTile) -> jax.Array:
    """f32[rows, 128]: a sink counts as one key with its logit and a zero value."""
    config, block_q = context.config, context.phase.block_q
    first = softmax_tile.head * config.group
    pieces = []
    for row, number in _pieces(softmax_tile, block_q):
        sink = context.inputs.sinks[first + (row >> log2(block_q))]
        logit = online_softmax.sink_logit(sink)
        pieces.append(jnp.full((number, LANES), logit, jnp.float32))
    return jnp.concatenate(pieces)


def _pieces(softmax_tile: SoftmaxTile, block_q: int) -> list[tuple[int, int]]:
    """First row and number of the rows that a softmax tile has of each query head."""
    _, first_row, num_rows = softmax_tile
    number = math.gcd(block_q, num_rows)
    return [(first_row + row, number) for row in range(0, num_rows, number)]

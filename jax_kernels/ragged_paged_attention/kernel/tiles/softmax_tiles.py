"""The query rows that go through the softmax together: their scores and their state.

A tile has *query rows*: those of a key head are its G query heads, each with its
``block_q`` tokens, in the order that ``parts.py`` gives. A *softmax tile* is some of
them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from jax_kernels.ragged_paged_attention.config import SUBLANES, softmax_rows
from jax_kernels.ragged_paged_attention.kernel import masking, online_softmax
from jax_kernels.ragged_paged_attention.kernel.block_loads import (
    largest_divisor,
    load_keys,
    load_values,
)
from jax_kernels.ragged_paged_attention.kernel.online_softmax import SoftmaxState
from jax_kernels.ragged_paged_attention.kernel.schedule import Cell, Int, log2
from jax_kernels.ragged_paged_attention.kernel.tiles import parts
from jax_kernels.ragged_paged_attention.kernel.tiles.buffers import TileContext
from jax_kernels.ragged_paged_attention.layout import LANES

# Softmax tiles in one stretch of code, within which the compiler overlaps them.
MAX_STRETCH_TILES = 16
# The same in float32, whose products take several times as much code.
MAX_F32_STRETCH_TILES = 4
# Heads are wide beyond these lanes: then products are most of the code of a tile. So
# that a loop fits instruction memory, a stretch has fewer in float32, and where the
# matrix units have 128 columns.
MANY_LANES = 256
MAX_WIDE_STRETCH_TILES = 2
MAX_WIDE_F32_STRETCH_TILES = 1
# The same in narrow matrix units if heads are wider than they are, or if there is a key
# head for every query head: keys and values are pushed in many pieces, and the code
# would not stay in its memory.
MAX_NARROW_STRETCH_TILES = 8
# The same of some parts of a tile.
MAX_PART_STRETCH_TILES = 8
# Query rows that are recovered at a time.
MAX_RECOVERY_ROWS = 128


class SoftmaxTile(NamedTuple):
    """Some query rows of one key head."""

    head: Int
    first_row: Int  # counted from the first row of the part
    num_rows: int
    part: Int = 0


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


def tiles_of_parts(
    context: TileContext, first_part: Int, number: int, first_head: Int, num_heads: int
) -> list[SoftmaxTile]:
    """The softmax tiles of some parts of a tile, of some key heads."""
    rows = number * parts.num_rows(context)
    num_rows = softmax_rows(rows)
    return [
        SoftmaxTile(first_head + offset, first_row, num_rows, first_part)
        for offset in range(num_heads)
        for first_row in range(0, rows, num_rows)
    ]


def round_heads(context: TileContext) -> int:
    """Key heads whose softmax tiles are in one stretch of code."""
    tiles_per_head = len(tiles_of_heads(context, 0, 1))
    return _most_heads(context, tiles_per_head, MAX_STRETCH_TILES)


def round_heads_of_parts(context: TileContext, number: int) -> int:
    """The same if the softmax tiles are those of so many parts."""
    tiles_per_head = len(tiles_of_parts(context, 0, number, 0, 1))
    return _most_heads(context, tiles_per_head, MAX_PART_STRETCH_TILES)


def _most_heads(context: TileContext, tiles_per_head: int, most_tiles: int) -> int:
    config = context.config
    is_wide = config.lanes > MANY_LANES
    if config.numerics.value_dtype == jnp.float32:
        most_tiles = MAX_WIDE_F32_STRETCH_TILES if is_wide else MAX_F32_STRETCH_TILES
    elif config.chip.matrix_columns <= LANES:
        if is_wide:
            most_tiles = MAX_WIDE_STRETCH_TILES
        elif config.lanes > LANES or config.group == 1:
            most_tiles = MAX_NARROW_STRETCH_TILES
    return largest_divisor(config.num_kv_heads, max(most_tiles // tiles_per_head, 1))


def no_sums() -> jax.Array:
    """f32[8, 128]: the sums of no rows, to which those of softmax tiles are added."""
    return jnp.zeros((SUBLANES, LANES), jnp.float32)


def recover_pieces(
    context: TileContext, recover: Callable[[SoftmaxTile], None]
) -> None:
    """Calls a function with all query rows, few at a time."""
    num_rows = math.gcd(parts.num_rows(context), MAX_RECOVERY_ROWS)
    pieces = parts.num_rows(context) // num_rows
    num_parts = parts.number(context)

    def piece(index: Int, _) -> None:
        part = lax.div(index, jnp.int32(pieces))
        first_row = pl.multiple_of((index - part * pieces) * num_rows, num_rows)
        head = part >> log2(num_parts)
        recover(SoftmaxTile(head, first_row, num_rows, part & (num_parts - 1)))

    lax.fori_loop(0, context.config.num_kv_heads * num_parts * pieces, piece, None)


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
    x = products(context, slot, tokens, softmax_tile)
    x = context.head_factors.multiply("score", x, softmax_tile.head)
    return online_softmax.finish_scores(x, context.config.numerics)


def products(
    context: TileContext, slot: Int, tokens: Tokens, softmax_tile: SoftmaxTile
) -> jax.Array:
    """f32[rows, tokens]: of queries and keys, nothing more."""
    config = context.config
    _, head, rows = state_index(context, softmax_tile)
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
    buffers, index = context.buffers, state_index(context, softmax_tile)
    return SoftmaxState(buffers.m[index], buffers.l[index], buffers.acc[index])


def store_state(
    context: TileContext, softmax_tile: SoftmaxTile, state: SoftmaxState
) -> None:
    buffers, index = context.buffers, state_index(context, softmax_tile)
    buffers.m[index], buffers.l[index], buffers.acc[index] = state


def visible_pairs(
    context: TileContext, cell: Cell, tokens: Tokens, softmax_tile: SoftmaxTile
) -> jax.Array:
    """bool[rows, tokens]: which query sees which key.

    Rows without a query see what the last query sees, so that they meet no dead key.
    """
    _, first_row, num_rows, part = softmax_tile
    row = lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0) + first_row
    token = parts.token_of_row(context, row) + part * parts.num_tokens(context)
    return is_visible(context, cell, tokens, token)


def store_visible_bits(
    context: TileContext,
    cell: Cell,
    tokens: Tokens,
    first_part: Int = 0,
    num_parts: int | None = None,
) -> None:
    """Keeps which query of a tile sees which of some tokens, as bits of its words.

    They are the same for all heads. They may be of some parts of the tile only.
    """
    visible, size = context.buffers.visible, parts.num_tokens(context)
    packing = context.phase.block_q // visible.shape[0]
    num_words = (num_parts or parts.number(context)) * size // packing
    first = _multiple_of(first_part * (size // packing), SUBLANES)
    word = lax.broadcasted_iota(jnp.int32, (num_words, 1), 0) + first
    bits = jnp.zeros((num_words, tokens.number), jnp.uint32)
    for place in range(packing):
        ones = jnp.uint32((2 ** (32 // packing) - 1) << (place * 32 // packing))
        is_seen = is_visible(context, cell, tokens, word * packing + place)
        bits |= jnp.where(is_seen, ones, jnp.uint32(0))
    visible[pl.ds(first, num_words)] = bits


def visible_bits(context: TileContext, softmax_tile: SoftmaxTile) -> jax.Array:
    """u32[rows // packing, tokens]: those that are kept, for the rows of a tile."""
    visible = context.buffers.visible
    packing = context.phase.block_q // visible.shape[0]
    pieces = []
    for piece in _pieces(context, softmax_tile):
        word = parts.num_tokens(context) // packing * piece.part
        word = _multiple_of(word + piece.token // packing, SUBLANES)
        pieces.append(visible[pl.ds(word, piece.num_rows // packing)])
    return jnp.concatenate(pieces)


def is_visible(
    context: TileContext, cell: Cell, tokens: Tokens, token: jax.Array
) -> jax.Array:
    """bool[n, tokens] for i32[n, 1], numbers of queries in the tile."""
    spec = context.config.spec
    key = lax.broadcasted_iota(jnp.int32, (1, tokens.number), 1)
    query = cell.query_position + jnp.minimum(token, cell.num_queries - 1)
    return masking.attention_mask(
        query,
        cell.block_start + tokens.first + key,
        cell.visible_end,
        cell.new_start,
        spec,
        None if spec.causal_block is None else spec.seen_end(query + 1),
    )


def state_index(context: TileContext, softmax_tile: SoftmaxTile):
    """Index of a softmax tile in the state."""
    head, first_row, num_rows, part = softmax_tile
    row = parts.first_row(context, part, 0) + first_row
    return 0, head, pl.ds(_multiple_of(row, math.gcd(num_rows, 32)), num_rows)


def _first_row(context: TileContext, tokens: Tokens) -> Int:
    """The packed row of the first token."""
    row = tokens.first >> log2(context.config.cache.packing)
    return _multiple_of(row, SUBLANES)


def _multiple_of(row: Int, size: int) -> Int:
    """A row that is known to be a multiple."""
    return row if isinstance(row, int) else pl.multiple_of(row, size)


def _sink_logits(context: TileContext, softmax_tile: SoftmaxTile) -> jax.Array:
    """f32[rows, 128]: a sink counts as one key with its logit and a zero value."""
    first = softmax_tile.head * context.config.group
    pieces = []
    for piece in _pieces(context, softmax_tile):
        logit = online_softmax.sink_logit(context.inputs.sinks[first + piece.member])
        pieces.append(jnp.full((piece.num_rows, LANES), logit, jnp.float32))
    return jnp.concatenate(pieces)


class _Piece(NamedTuple):
    """Query rows of consecutive tokens of one query head, in one part of a tile."""

    part: Int
    member: Int  # query head of the key head
    token: Int  # the first one, counted from the first of the part
    num_rows: int


def _pieces(context: TileContext, softmax_tile: SoftmaxTile) -> list[_Piece]:
    """The rows of a softmax tile; one at a row that is traced has them of one part."""
    _, first_row, num_rows, part = softmax_tile
    size = parts.num_tokens(context)
    number = math.gcd(size, num_rows)
    pieces = []
    for row in range(0, num_rows, number):
        later, row = 0, first_row + row
        if isinstance(row, int):
            later, row = divmod(row, parts.num_rows(context))
        member, token = row >> log2(size), row & (size - 1)
        pieces.append(_Piece(part + later, member, token, number))
    return pieces

"""A block of which some query does not see all, in chunks with masks.

First come chunks of which all parts of the tile see some key, which the whole tile
attends. The parts that see something of the others attend those two by two.
"""

import functools

import jax
from jax import lax

from jax_kernels.ragged_paged_attention.kernel import ints
from jax_kernels.ragged_paged_attention.kernel.block_loads import value_words_mask
from jax_kernels.ragged_paged_attention.kernel.schedule import Cell, Int, log2
from jax_kernels.ragged_paged_attention.kernel.tiles import (
    parts,
    softmax_tiles,
    stretch,
)
from jax_kernels.ragged_paged_attention.kernel.tiles.buffers import (
    TileContext,
    chunk_tokens,
)
from jax_kernels.ragged_paged_attention.kernel.tiles.softmax_tiles import Tokens
from jax_kernels.ragged_paged_attention.kernel.tiles.stretch import Mask


def attend_chunks(context: TileContext, cell: Cell, slot: Int) -> jax.Array:
    """The chunks of a block that some query sees.

    Returns what ``stretch.attend`` does.
    """
    first, end = _chunks(context, cell)
    whole_tile_end = num_chunks_of_whole_tile(context, cell)

    def attend_chunk(index: Int, sums: jax.Array) -> jax.Array:
        tokens = _tokens(context, index)
        if not stretch.has_running_maximum(context):
            softmax_tiles.store_visible_bits(context, cell, tokens)
        attend = functools.partial(stretch.attend_tiles, context, slot, tokens)
        mask = _mask(context, cell, tokens)
        is_first = (cell.block == 0) & (index == first)
        if stretch.has_running_maximum(context):
            return sums + attend(is_first, mask=mask)
        # Most chunks are not the first one, and then need no search for an anchor.
        return sums + lax.cond(
            is_first,
            functools.partial(attend, True, mask=mask),
            functools.partial(attend, False, mask=mask),
        )

    sums = lax.fori_loop(first, whole_tile_end, attend_chunk, softmax_tiles.no_sums())
    if parts.number(context) == 1:
        return sums
    attend_parts = functools.partial(_attend_parts, context, cell, slot)
    return lax.fori_loop(whole_tile_end, end, attend_parts, sums)


def num_chunks_of_whole_tile(context: TileContext, cell: Cell) -> Int:
    """The chunk after the last one that the whole tile attends.

    Args:
      context: Of the phase.
      cell: A cell of which some query does not see all.
    """
    _, end = _chunks(context, cell)
    if parts.number(context) == 1:
        return end
    return ints.minimum(
        parts.first_chunk_of_some(context, cell, chunk_tokens(context.phase)), end
    )


def _chunks(context: TileContext, cell: Cell) -> tuple[Int, Int]:
    """The first chunk that some query sees, and the one after the last."""
    size = chunk_tokens(context.phase)
    begin = cell.visible_begin - cell.block_start
    end = cell.visible_end - cell.block_start
    first = ints.maximum(begin, 0) >> log2(size)
    num_chunks = ints.ceil_div(ints.minimum(end, context.phase.block_kv), size)
    # Queries without any key need a state all the same.
    return first, ints.maximum(num_chunks, first + 1)


def _tokens(context: TileContext, chunk: Int) -> Tokens:
    size = chunk_tokens(context.phase)
    return Tokens(chunk * size, size)


def _mask(context: TileContext, cell: Cell, tokens: Tokens) -> Mask:
    start = cell.block_start + tokens.first
    begin, end = cell.visible_begin - start, cell.visible_end - start
    return Mask(cell, value_words_mask(begin, end, tokens.number, context.config))


def _attend_parts(
    context: TileContext, cell: Cell, slot: Int, chunk: Int, sums: jax.Array
) -> jax.Array:
    """One chunk, attended by the parts that see a key of it; adds to the sums."""
    tokens = _tokens(context, chunk)
    begin = parts.first_that_sees(context, cell, cell.block_start + tokens.first)
    end = parts.with_queries(context, cell.num_queries)

    def attend(
        is_first: bool, number: int, first_part: Int, sums: jax.Array
    ) -> jax.Array:
        softmax_tiles.store_visible_bits(context, cell, tokens, first_part, number)
        mask = _mask(context, cell, tokens)
        round_heads = softmax_tiles.round_heads_of_parts(context, number)

        def run_round(index: Int, sums: jax.Array) -> jax.Array:
            tiles = softmax_tiles.tiles_of_parts(
                context, first_part, number, index * round_heads, round_heads
            )
            scores = softmax_tiles.scores(context, slot, tokens, tiles[0])
            return sums + stretch.attend(
                context, slot, tokens, is_first, tiles, scores, mask
            )

        num_rounds = context.config.num_kv_heads // round_heads
        return lax.fori_loop(0, num_rounds, run_round, sums)

    def start(sums: jax.Array) -> jax.Array:
        return lax.fori_loop(begin, end, functools.partial(attend, True, 1), sums)

    def go_on(sums: jax.Array) -> jax.Array:
        if parts.number(context) > parts.PAIR:
            sums = lax.fori_loop(
                0,
                (end - begin) >> log2(parts.PAIR),
                lambda index, sums: attend(
                    False, parts.PAIR, begin + index * parts.PAIR, sums
                ),
                sums,
            )
        return lax.cond(
            ((end - begin) & (parts.PAIR - 1)) > 0,
            functools.partial(attend, False, 1, end - 1),
            lambda sums: sums,
            sums,
        )

    is_first = (cell.block == 0) & (chunk == 0)
    return lax.cond(is_first, start, go_on, sums)

"""Parts of a tile: of its query tokens, some neighbours that are attended together.

A tile has up to four parts of equally many tokens. Where a block needs a mask, late
queries may see keys that early ones do not, and the last tile of a sequence has fewer
queries than there is room for: the parts that would do nothing are left out.

The query rows of a key head are in order of parts, then of query heads, then of tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jax_kernels.ragged_paged_attention.config import SUBLANES
from jax_kernels.ragged_paged_attention.kernel import ints
from jax_kernels.ragged_paged_attention.kernel.ints import Bool
from jax_kernels.ragged_paged_attention.kernel.schedule import Cell, Int, log2
from jax_kernels.ragged_paged_attention.kernel.tiles.buffers import TileContext
from jax_kernels.ragged_paged_attention.layout import dtype_packing

MAX_PARTS = 4
# Parts that are attended together where so many are left.
PAIR = 2


def number(context: TileContext) -> int:
    """Parts of a tile; 1 where all queries see the same keys, or code would be long.

    Products in float32 take several times as much, and as many key heads as query heads
    need a lot. With a window or with float8 probabilities, masked blocks have code of
    their own.
    Tokens of a part fill registers of queries.
    """
    config = context.config
    spec, numerics = config.spec, config.numerics
    if not spec.causal or spec.sliding_window is not None or spec.attend != "all":
        return 1
    is_float32 = numerics.value_dtype == jnp.float32
    if is_float32 or config.group == 1 or numerics.float8_probabilities is not None:
        return 1
    least = SUBLANES * dtype_packing(numerics.multiply_dtype)
    return min(MAX_PARTS, max(context.phase.block_q // least, 1))


def num_tokens(context: TileContext) -> int:
    """Query tokens of a part, a power of two."""
    return context.phase.block_q // number(context)


def num_rows(context: TileContext) -> int:
    """Query rows that a part has of each key head."""
    return context.config.group * num_tokens(context)


def first_row(context: TileContext, part: Int, member: int) -> Int:
    """The row of the first token that a part has of a query head of a key head."""
    return part * num_rows(context) + member * num_tokens(context)


def token_of_row(context: TileContext, row: jax.Array) -> jax.Array:
    """The number in the tile of the tokens of query rows, i32 like ``row``."""
    part = jnp.zeros_like(row)
    for later in range(1, number(context)):
        part += (row >= later * num_rows(context)).astype(jnp.int32)
    size = num_tokens(context)
    return part * size + (row - part * num_rows(context) & (size - 1))


def with_queries(context: TileContext, num_queries: Int) -> Int:
    """Parts that have a query: as many of the first ones."""
    return ints.ceil_div(num_queries, num_tokens(context))


def are_some_idle(context: TileContext, num_queries: Int) -> Bool:
    """Whether some part of a tile has no query: then parts attend all keys."""
    return with_queries(context, num_queries) < number(context)


def first_that_sees(context: TileContext, cell: Cell, key: Int) -> Int:
    """The first part that sees a key, or some key after it; else the last one.

    Of the first key of a sequence, it is the first part of a tile, whether there is a
    key or not: so all rows get a state.

    Args:
      context: Of the phase.
      cell: The cell, which has queries.
      key: The position of the key.
    """
    last = with_queries(context, cell.num_queries) - 1
    query = context.config.spec.first_that_sees(key)
    part = (query - cell.query_position) >> log2(num_tokens(context))
    return ints.where(key == 0, 0, ints.minimum(ints.maximum(part, 0), last))


def first_chunk_of_some(context: TileContext, cell: Cell, size: int) -> Int:
    """The first chunk of a block of which not all parts see a key.

    It may be past the last chunk.

    Args:
      context: Of the phase.
      cell: The cell, which has queries.
      size: Tokens of a chunk, a power of two.
    """
    # The first part sees nothing from here on.
    end = context.config.spec.seen_end(cell.query_position + num_tokens(context))
    chunk = ints.ceil_div(ints.maximum(end - cell.block_start, 0), size)
    # All rows get a state from the first chunk, also where positions are below zero.
    chunk = ints.maximum(chunk, ints.where(cell.block == 0, 1, 0))
    return ints.where(are_some_idle(context, cell.num_queries), 0, chunk)


def for_each(context: TileContext, num_queries: Int, do: Callable[[Int], None]) -> None:
    """Calls a function with each part that has a query; there may be no query."""
    if number(context) == 1:
        do(0)
    else:
        end = with_queries(context, num_queries)
        lax.fori_loop(0, end, lambda part, _: do(part), None)

"""One cell of prefill or mixed: a tile of queries meets a block of keys and values.

A tile has *query rows*: those of a key head are its G query heads, each with its
``block_q`` tokens, in the order that ``parts.py`` gives. A *softmax tile* is some of
them.

A row's maximum is fixed by the first keys that it sees, its *anchor*
(``online_softmax.anchor``): then probabilities follow scores at once, and nothing waits
for all scores of a block. ``recovery.py`` serves the rows whose later scores are too
far above their anchor, which is rare.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_kernels.ragged_paged_attention.kernel import (
    ints,
    masking,
    online_softmax,
    tile_io,
)
from jax_kernels.ragged_paged_attention.kernel.ints import Bool
from jax_kernels.ragged_paged_attention.kernel.lse_rows import LseRows
from jax_kernels.ragged_paged_attention.kernel.schedule import Cell, Int
from jax_kernels.ragged_paged_attention.kernel.tiles import (
    float8,
    masked,
    parts,
    recovery,
    softmax_tiles,
    stretch,
)
from jax_kernels.ragged_paged_attention.kernel.tiles.buffers import (
    ONLY_SLOT,
    TileContext,
)
from jax_kernels.ragged_paged_attention.kernel.tiles.softmax_tiles import (
    SoftmaxTile,
    Tokens,
)


def prepare_queries(
    context: TileContext, num_queries: Int, *, by_part: bool = False
) -> None:
    """Splits a tile by key head, applies the multiplier and casts, once per tile.

    Rows without a query become zeros: any scores of theirs are in range.

    Args:
      context: Of the phase.
      num_queries: Of the tile.
      by_part: Whether one part comes after the other, and those without a query stay
        as they are.
    """
    config, size = context.config, parts.num_tokens(context)
    layout = config.query_layout
    source = context.rings.queries.at[ONLY_SLOT]
    queries = tile_io.TokenWords(source, layout, config.interpret)

    def prepare(first_part: Int, num_parts: int) -> None:
        token = lax.broadcasted_iota(jnp.int32, (num_parts * size, 1), 0)
        first_token = first_part * size
        is_query = token < num_queries - first_token
        for word in range(config.num_io_heads // layout.packing):
            words = queries.load(word, first_token, num_parts * size)
            words = jnp.where(is_query, words, jnp.uint32(0))
            for offset, x in enumerate(tile_io.unpack_heads(words, layout.packing)):
                head, member = divmod(word * layout.packing + offset, config.io_group)
                if member >= config.group:
                    continue
                x = context.head_factors.multiply("query", x, head)
                x = tile_io.prepare_queries(tile_io.widen(x, config.lanes), config)
                for index, rows in enumerate(jnp.split(x, num_parts)):
                    row = parts.first_row(context, first_part + index, member)
                    context.buffers.q[head, pl.ds(row, size), :] = rows

    if by_part:
        parts.for_each(context, num_queries, functools.partial(prepare, num_parts=1))
    else:
        prepare(0, parts.number(context))


def store_output(context: TileContext) -> None:
    """Normalises a tile and lays it out as ``[tokens, heads, head_dim]``."""
    for part in range(parts.number(context)):
        _store_output_of_part(context, part)


def store_output_by_part(context: TileContext, num_queries: Int) -> None:
    """The same, one part after the other, of those with a query."""
    store = functools.partial(_store_output_of_part, context)
    parts.for_each(context, num_queries, store)


def _store_output_of_part(context: TileContext, part: Int) -> None:
    config, size = context.config, parts.num_tokens(context)
    has_pending = float8.is_used(context)
    load_state = float8.final_state if has_pending else softmax_tiles.load_state
    layout = config.out_layout
    target = context.rings.out.at[ONLY_SLOT]
    outputs = tile_io.TokenWords(target, layout, config.interpret)
    lse_by_head = {}
    for word in range(config.num_io_heads // layout.packing):
        heads = []
        for offset in range(layout.packing):
            head, member = divmod(word * layout.packing + offset, config.io_group)
            # A head that is nothing gets what its neighbour has.
            is_head, member = member < config.group, min(member, config.group - 1)
            softmax_tile = SoftmaxTile(head, member * size, size, part)
            state = load_state(context, softmax_tile)
            if not (config.numerics.sums_in_matrix_unit or has_pending):
                state = online_softmax.whole_sums(state)
            if config.spec.return_lse and is_head:
                query_head = head * config.group + member
                lse_by_head[query_head] = online_softmax.log_sums(
                    state, config.numerics
                )
            out = online_softmax.normalise(state, config.numerics.output_scale)
            out = context.head_factors.multiply("output", out, head)
            heads.append(tile_io.value_lanes_first(out, config.cache))
        words = tile_io.pack_heads(heads, config.interpret)[:, : config.io_lanes]
        outputs.store(words, word, part * size)
    if lse_by_head:
        lse = LseRows(context.rings.lse.at[ONLY_SLOT], config)
        lse.store_heads(lse_by_head, first_head=0, first_token=part * size)


def attend(
    context: TileContext,
    cell: Cell,
    slot: Int,
    following_slot: Int,
    plan: Callable[[], Any],
    when_empty: Callable[[], None],
) -> Any:
    """Attends the queries of a cell, and plans a later one on the way.

    Args:
      context: Of the phase.
      cell: The cell.
      slot: Of its keys and values.
      following_slot: Of those of the next cell, which has been received.
      plan: Plans a cell; runs in the shadow of the computation.
      when_empty: More to do for a cell without queries.

    Returns:
      The result of ``plan``.
    """

    def do_nothing() -> jax.Array:
        when_empty()
        return softmax_tiles.no_sums()

    def with_plan(compute: Callable[[], jax.Array]) -> tuple[Any, jax.Array]:
        sums = compute()
        # Before the computation it would delay the addresses of the first keys.
        planned = plan()
        return planned, online_softmax.are_in_range(sums)

    attend_block = functools.partial(_attend_block, following_slot=following_slot)
    attend_chunks, recover = masked.attend_chunks, recovery.recover
    if float8.is_used(context):
        attend_block, attend_chunks = float8.attend_block, float8.attend_chunks
        recover = float8.recover

        @pl.when((cell.block == 0) & (cell.num_queries > 0))
        def _():
            float8.start(context, cell, slot)

    computations = (
        functools.partial(attend_block, context, cell, slot),
        functools.partial(attend_chunks, context, cell, slot),
        do_nothing,
    )
    planned, are_in_range = lax.switch(
        jnp.where(cell.num_queries > 0, jnp.where(is_whole(context, cell), 0, 1), 2),
        [functools.partial(with_plan, compute) for compute in computations],
    )

    @pl.when(jnp.logical_not(are_in_range))
    def _():
        recover(context, cell, slot)

    return planned


def is_whole(context: TileContext, cell: Cell) -> jax.Array:
    """bool: whether the whole tile meets the whole block, without masks.

    Then there are queries, and all of them see all of the block.
    """
    spec, block_kv = context.config.spec, context.phase.block_kv
    # Masked chunks raise their maximum, and a whole block does not.
    if spec.batch_invariant and stretch.has_running_maximum(context):
        return jnp.bool(False)
    is_masked = masking.needs_mask(cell, block_kv, spec)
    if parts.number(context) > 1:
        is_masked |= parts.are_some_idle(context, cell.num_queries)
    return (cell.num_queries > 0) & jnp.logical_not(is_masked)


def score_ahead(context: TileContext, slot: Int, head: Int = 0) -> None:
    """Computes the scores that the code of a cell, or of a round, begins with.

    With them the softmax and the products of the next scores begin at once.

    Args:
      context: Of the phase.
      slot: Of the keys and values.
      head: The first key head of the round.
    """
    if float8.is_used(context):
        return
    softmax_tile = SoftmaxTile(head, 0, context.config.softmax_rows(context.phase))
    block = Tokens(0, context.phase.block_kv)
    scores = softmax_tiles.scores(context, slot, block, softmax_tile)
    softmax_tiles.store_waiting_scores(context, scores)


def are_ends_at_once(context: TileContext, cell: Cell, following: Cell) -> Bool:
    """Whether a tile ends while the next begins, in one stretch of code.

    That is faster if there is something to do for all parts of both.

    Args:
      context: Of the phase.
      cell: The last one of the tile.
      following: The first one of the next tile.
    """
    if parts.number(context) == 1:
        return True
    is_any_idle = parts.are_some_idle(context, cell.num_queries)
    is_any_idle |= parts.are_some_idle(context, following.num_queries)
    return jnp.logical_not(is_any_idle)


def score_following(context: TileContext, cell: Cell, slot: Int) -> None:
    """``score_ahead`` for a cell of which the whole tile attends some keys."""
    if parts.number(context) == 1:
        score_ahead(context, slot)
        return

    @pl.when(
        is_whole(context, cell) | (masked.num_chunks_of_whole_tile(context, cell) > 0)
    )
    def _():
        score_ahead(context, slot)


def _attend_block(
    context: TileContext, cell: Cell, slot: Int, following_slot: Int
) -> jax.Array:
    """A block that every query sees; then the first scores of the following cell.

    Returns what ``stretch.attend`` does.
    """
    block = Tokens(0, context.phase.block_kv)
    num_rounds = context.config.num_kv_heads // softmax_tiles.round_heads(context)

    def score_next_round(index: Int) -> None:
        is_last = index + 1 == num_rounds
        next_slot = ints.where(is_last, following_slot, slot)
        head = ints.where(is_last, 0, (index + 1) * softmax_tiles.round_heads(context))
        score_ahead(context, next_slot, head)

    return stretch.attend_tiles(context, slot, block, cell.block == 0, score_next_round)

"""One cell of prefill or mixed: a tile of queries meets a block of keys and values.

A tile has *query rows*: those of a key head are its G query heads, each with its
``block_q`` tokens, row = g * block_q + t. A *softmax tile* is some of them.

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

from jax_kernels.ragged_paged_attention.config import SUBLANES
from jax_kernels.ragged_paged_attention.kernel import (
    ints,
    masking,
    online_softmax,
    tile_io,
)
from jax_kernels.ragged_paged_attention.kernel.block_loads import (
    largest_divisor,
    value_words_mask,
)
from jax_kernels.ragged_paged_attention.kernel.ints import Bool
from jax_kernels.ragged_paged_attention.kernel.online_softmax import SoftmaxState
from jax_kernels.ragged_paged_attention.kernel.schedule import Cell, Int, log2
from jax_kernels.ragged_paged_attention.kernel.tiles import recovery, softmax_tiles
from jax_kernels.ragged_paged_attention.kernel.tiles.buffers import (
    ONLY_SLOT,
    TileContext,
)
from jax_kernels.ragged_paged_attention.kernel.tiles.softmax_tiles import (
    Place,
    SoftmaxTile,
    Tokens,
)
from jax_kernels.ragged_paged_attention.layout import LANES

# Softmax tiles in one stretch of code, within which the compiler overlaps them.
MAX_STRETCH_TILES = 16
# The same in float32, whose products take several times as much code.
MAX_F32_STRETCH_TILES = 4
# Blocks that need a mask are computed this many tokens at a time: the columns of a
# matrix unit.
MASKED_TOKENS = 256


def prepare_queries(context: TileContext, query_slot: Int, num_queries: Int) -> None:
    """Splits a tile by key head, applies the multiplier and casts, once per tile.

    Rows without a query become zeros: any scores of theirs are in range.
    """
    config, block_q = context.config, context.phase.block_q
    layout = config.query_layout
    source = context.rings.queries.at[ONLY_SLOT]
    queries = tile_io.TokenWords(source, layout, config.interpret)
    is_query = lax.broadcasted_iota(jnp.int32, (block_q, 1), 0) < num_queries
    for word in range(config.num_io_heads // layout.packing):
        words = queries.load(word, 0, block_q)
        words = jnp.where(is_query, words, jnp.uint32(0))
        for offset, x in enumerate(tile_io.unpack_heads(words, layout.packing)):
            head, member = divmod(word * layout.packing + offset, config.io_group)
            if member >= config.group:
                continue
            place = pl.ds(member * block_q, block_q)
            x = tile_io.prepare_queries(tile_io.widen(x, config.lanes), config)
            context.buffers.q[query_slot, head, place, :] = x


def store_output(context: TileContext) -> None:
    """Normalises a tile and lays it out as ``[tokens, heads, head_dim]``."""
    config, buffers = context.config, context.buffers
    block_q = context.phase.block_q
    layout = config.out_layout
    target = context.rings.out.at[ONLY_SLOT]
    outputs = tile_io.TokenWords(target, layout, config.interpret)
    for word in range(config.num_io_heads // layout.packing):
        heads = []
        for offset in range(layout.packing):
            head, member = divmod(word * layout.packing + offset, config.io_group)
            # A head that is nothing gets what its neighbour has.
            member = min(member, config.group - 1)
            place = 0, head, pl.ds(member * block_q, block_q)
            state = SoftmaxState(buffers.m[place], buffers.l[place], buffers.acc[place])
            out = online_softmax.normalise(state, config.numerics.output_scale)
            heads.append(tile_io.value_lanes_first(out, config.cache))
        words = tile_io.pack_heads(heads, config.interpret)[:, : config.io_lanes]
        outputs.store(words, word, 0)


def attend(
    context: TileContext,
    cell: Cell,
    here: Place,
    plan: Callable[[], Any],
    when_empty: Callable[[], None],
) -> Any:
    """Attends the queries of a cell, and plans a later one on the way.

    Args:
      context: Of the phase.
      cell: The cell.
      here: Its place.
      plan: Plans a cell; runs in the shadow of the computation.
      when_empty: More to do for a cell without queries.

    Returns:
      The result of ``plan``.
    """

    def do_nothing() -> jax.Array:
        when_empty()
        return _no_sums()

    def with_plan(compute: Callable[[], jax.Array]) -> tuple[Any, jax.Array]:
        sums = compute()
        # Before the computation it would delay the addresses of the first keys.
        planned = plan()
        return planned, online_softmax.are_in_range(sums)

    is_masked = masking.needs_mask(cell, context.phase.block_kv, context.config.spec)
    computations = (
        functools.partial(_attend_block, context, cell, here),
        functools.partial(_attend_chunks, context, cell, here),
        do_nothing,
    )
    planned, are_in_range = lax.switch(
        jnp.where(cell.num_queries > 0, is_masked.astype(jnp.int32), 2),
        [functools.partial(with_plan, compute) for compute in computations],
    )

    @pl.when(jnp.logical_not(are_in_range))
    def _():
        recovery.recover(context, cell, here)

    return planned


def _attend_block(context: TileContext, cell: Cell, here: Place) -> jax.Array:
    """A block that every query sees. Returns what ``_attend_tiles`` does."""
    tokens = Tokens(0, context.phase.block_kv)
    return _attend_tiles(context, here, tokens, cell.block == 0)


def _attend_chunks(context: TileContext, cell: Cell, here: Place) -> jax.Array:
    """The part of a block that some query sees, in chunks with masks.

    Returns what ``_attend_tiles`` does.
    """
    config = context.config
    size = min(MASKED_TOKENS, context.phase.block_kv)
    begin = cell.visible_begin - cell.block_start
    end = cell.visible_end - cell.block_start
    first = ints.maximum(begin, 0) >> log2(size)
    num_chunks = ints.ceil_div(ints.minimum(end, context.phase.block_kv), size)
    # Queries without any key need a state all the same.
    num_chunks = ints.maximum(num_chunks, first + 1)

    def attend_chunk(index: Int, _) -> jax.Array:
        tokens = Tokens(index * size, size)
        attend_tiles = functools.partial(
            _attend_tiles,
            context,
            here,
            tokens,
            mask=functools.partial(
                softmax_tiles.visible_pairs, context, cell, tokens=tokens
            ),
            words_mask=value_words_mask(
                begin - tokens.first, end - tokens.first, size, config
            ),
        )
        is_first = (cell.block == 0) & (index == first)
        if config.spec.sliding_window is not None:
            return attend_tiles(is_first=is_first)
        # Most chunks are not the first one, and then need no search for an anchor.
        return lax.cond(
            is_first,
            functools.partial(attend_tiles, is_first=True),
            functools.partial(attend_tiles, is_first=False),
        )

    return lax.fori_loop(first, num_chunks, attend_chunk, _no_sums())


def _attend_tiles(
    context: TileContext,
    here: Place,
    tokens: Tokens,
    is_first: Bool,
    mask: Callable[..., jax.Array] | None = None,
    words_mask: jax.Array | None = None,
) -> jax.Array:
    """Scores, softmax and values of some tokens of a block, for all softmax tiles.

    Args:
      context: Of the phase.
      here: The place of the cell.
      tokens: Which.
      is_first: Whether they are the first ones for their queries.
      mask: Gives bool[rows, tokens] for a softmax tile, if some query does not see all.
      words_mask: As in ``block_loads.load_values``.

    Returns:
      f32[8, 128]: what is finite, and in range, if the sums of all rows are.
    """
    config = context.config
    num_rows = config.softmax_rows(context.phase)
    tiles_per_head = config.query_rows(context.phase) // num_rows
    is_f32 = config.numerics.value_dtype == jnp.float32
    most_tiles = MAX_F32_STRETCH_TILES if is_f32 else MAX_STRETCH_TILES
    round_heads = largest_divisor(
        config.num_kv_heads, max(most_tiles // tiles_per_head, 1)
    )
    # A row that sees none of the first keys, for a window, has no anchor yet.
    is_anchored = mask is None or config.spec.sliding_window is None
    # Softmax tiles whose scores wait: for the mask, but not for the compiler's order of
    # long stretches, in which they would be spilled.
    ahead = 0 if mask is None else 1

    def run_round(index: Int, sums: jax.Array) -> jax.Array:
        tiles = [
            SoftmaxTile(index * round_heads + offset, number * num_rows, num_rows)
            for offset in range(round_heads)
            for number in range(tiles_per_head)
        ]
        scores_of = functools.partial(softmax_tiles.scores, context, here, tokens)
        waiting = [scores_of(softmax_tile) for softmax_tile in tiles[:ahead]]
        for number, softmax_tile in enumerate(tiles):
            if number + ahead < len(tiles):
                waiting.append(scores_of(tiles[number + ahead]))
            scores = waiting.pop(0)
            if mask is not None:
                is_seen = mask(softmax_tile=softmax_tile)
                scores = jnp.where(is_seen, scores, online_softmax.MASKED_SCORE)
            v = softmax_tiles.values(
                context, here, softmax_tile.head, tokens, words_mask
            )
            state = _update_state(
                context, softmax_tile, is_first, is_anchored, scores, v
            )
            softmax_tiles.store_state(context, softmax_tile, state)
            sums += state.l.reshape(-1, SUBLANES, LANES).sum(axis=0)
        return sums

    return lax.fori_loop(0, config.num_kv_heads // round_heads, run_round, _no_sums())


def _no_sums() -> jax.Array:
    return jnp.zeros((SUBLANES, LANES), jnp.float32)


def _update_state(
    context: TileContext,
    softmax_tile: SoftmaxTile,
    is_first: Bool,
    is_anchored: bool,
    scores: jax.Array,
    v: jax.Array,
) -> SoftmaxState:
    """The state of one softmax tile after some keys."""
    config = context.config
    before = softmax_tiles.load_state(context, softmax_tile)
    start = softmax_tiles.start_state(context, softmax_tile)
    m, l, acc = (  # noqa: E741
        ints.where(is_first, new, old) for new, old in zip(start, before, strict=True)
    )
    value_dtype = config.numerics.value_dtype
    if not is_anchored:
        p, m, correction = online_softmax.probabilities(scores, m)
        l, acc = online_softmax.accumulate(  # noqa: E741
            p, v, correction, l, acc, value_dtype
        )
        return SoftmaxState(m, l, acc)
    anchor = m
    if is_first is not False:
        anchor = ints.where(is_first, online_softmax.anchor(scores, start.m), m)
    if config.spec.has_sinks and is_first is not False:
        # Only the sink was summed before the first block.
        l = l * jnp.exp2(m - anchor)  # noqa: E741
    p = online_softmax.probabilities_at(scores, anchor)
    row_sum, weighted = online_softmax.sum_and_weigh(p, v, config.lanes, value_dtype)
    return SoftmaxState(anchor, l + row_sum, acc + weighted)

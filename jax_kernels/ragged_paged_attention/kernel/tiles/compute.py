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
from typing import Any, NamedTuple

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
    value_words_mask,
)
from jax_kernels.ragged_paged_attention.kernel.ints import Bool
from jax_kernels.ragged_paged_attention.kernel.lse_rows import LseRows
from jax_kernels.ragged_paged_attention.kernel.online_softmax import (
    ANCHOR_KEYS,
    SoftmaxState,
)
from jax_kernels.ragged_paged_attention.kernel.schedule import Cell, Int, log2
from jax_kernels.ragged_paged_attention.kernel.tiles import (
    float8,
    recovery,
    softmax_tiles,
)
from jax_kernels.ragged_paged_attention.kernel.tiles.buffers import (
    ONLY_SLOT,
    TileContext,
    chunk_tokens,
)
from jax_kernels.ragged_paged_attention.kernel.tiles.softmax_tiles import (
    SoftmaxTile,
    Tokens,
)
from jax_kernels.ragged_paged_attention.layout import LANES


def prepare_queries(context: TileContext, num_queries: Int) -> None:
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
            context.buffers.q[head, place, :] = x


def store_output(context: TileContext) -> None:
    """Normalises a tile and lays it out as ``[tokens, heads, head_dim]``."""
    config, block_q = context.config, context.phase.block_q
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
            softmax_tile = SoftmaxTile(head, member * block_q, block_q)
            state = load_state(context, softmax_tile)
            if not (config.numerics.sums_in_matrix_unit or has_pending):
                state = online_softmax.whole_sums(state)
            if config.spec.return_lse and is_head:
                query_head = head * config.group + member
                lse_by_head[query_head] = online_softmax.log_sums(
                    state, config.numerics
                )
            out = online_softmax.normalise(state, config.numerics.output_scale)
            heads.append(tile_io.value_lanes_first(out, config.cache))
        words = tile_io.pack_heads(heads, config.interpret)[:, : config.io_lanes]
        outputs.store(words, word, 0)
    if lse_by_head:
        lse = LseRows(context.rings.lse.at[ONLY_SLOT], config)
        lse.store_heads(lse_by_head, first_head=0, first_token=0)


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
    attend_chunks, recover = _attend_chunks, recovery.recover
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
    """bool: whether there are queries, and all of them see all of the block."""
    spec, block_kv = context.config.spec, context.phase.block_kv
    is_masked = masking.needs_mask(cell, block_kv, spec)
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


def _attend_block(
    context: TileContext, cell: Cell, slot: Int, following_slot: Int
) -> jax.Array:
    """A block that every query sees; then the first scores of the following cell.

    Returns what ``_attend_tiles`` does.
    """
    block = Tokens(0, context.phase.block_kv)
    num_rounds = context.config.num_kv_heads // softmax_tiles.round_heads(context)

    def score_next_round(index: Int) -> None:
        is_last = index + 1 == num_rounds
        next_slot = ints.where(is_last, following_slot, slot)
        head = ints.where(is_last, 0, (index + 1) * softmax_tiles.round_heads(context))
        score_ahead(context, next_slot, head)

    return _attend_tiles(context, slot, block, cell.block == 0, score_next_round)


def _attend_chunks(context: TileContext, cell: Cell, slot: Int) -> jax.Array:
    """The part of a block that some query sees, in chunks with masks.

    Returns what ``_attend_tiles`` does.
    """
    config = context.config
    size = chunk_tokens(context.phase)
    begin = cell.visible_begin - cell.block_start
    end = cell.visible_end - cell.block_start
    first = ints.maximum(begin, 0) >> log2(size)
    num_chunks = ints.ceil_div(ints.minimum(end, context.phase.block_kv), size)
    # Queries without any key need a state all the same.
    num_chunks = ints.maximum(num_chunks, first + 1)

    def attend_chunk(index: Int, _) -> jax.Array:
        tokens = Tokens(index * size, size)
        if not _has_running_maximum(context):
            softmax_tiles.store_visible_bits(context, cell, tokens)
        words_mask = value_words_mask(
            begin - tokens.first, end - tokens.first, size, config
        )
        attend_tiles = functools.partial(
            _attend_tiles, context, slot, tokens, mask=Mask(cell, words_mask)
        )
        is_first = (cell.block == 0) & (index == first)
        if _has_running_maximum(context):
            return attend_tiles(is_first)
        # Most chunks are not the first one, and then need no search for an anchor.
        return lax.cond(
            is_first,
            functools.partial(attend_tiles, True),
            functools.partial(attend_tiles, False),
        )

    return lax.fori_loop(first, num_chunks, attend_chunk, softmax_tiles.no_sums())


class Mask(NamedTuple):
    """What of some tokens takes part."""

    cell: Cell  # whose queries see some of them
    words: jax.Array  # as in ``block_loads.load_values``


def _has_running_maximum(context: TileContext) -> bool:
    """Whether blocks with a mask have one: their first keys may give no anchor."""
    return context.config.spec.hides_first_keys


def _attend_tiles(
    context: TileContext,
    slot: Int,
    tokens: Tokens,
    is_first: Bool,
    score_next_round: Callable[[Int], None] | None = None,
    mask: Mask | None = None,
) -> jax.Array:
    """Scores, softmax and values of some tokens of a block, for all softmax tiles.

    Scores are computed one softmax tile ahead.

    Args:
      context: Of the phase.
      slot: Of the keys and values.
      tokens: Which.
      is_first: Whether they are the first ones for their queries.
      score_next_round: Computes the scores that wait for what comes after a round.
      mask: If some query does not see all of them.

    Returns:
      f32[8, 128]: what is in range only if the sums of all rows are.
    """
    round_heads = softmax_tiles.round_heads(context)
    num_rounds = context.config.num_kv_heads // round_heads
    # Only the first scores of a cell wait for its chunks.
    are_waiting = score_next_round is not None or num_rounds == 1

    def run_round(index: Int, sums: jax.Array) -> jax.Array:
        tiles = softmax_tiles.tiles_of_heads(context, index * round_heads, round_heads)
        scores_of = functools.partial(softmax_tiles.scores, context, slot, tokens)
        later_scores = (
            softmax_tiles.waiting_scores(context, tokens)
            if are_waiting
            else scores_of(tiles[0])
        )
        for number, softmax_tile in enumerate(tiles):
            scores = later_scores
            is_end = number + 1 == len(tiles)
            if not is_end:
                later_scores = scores_of(tiles[number + 1])
            elif score_next_round is not None:
                score_next_round(index)
            v = softmax_tiles.values(
                context, slot, softmax_tile.head, tokens, mask and mask.words
            )
            sums += _update_state(
                context, softmax_tile, tokens, is_first, scores, v, mask, is_end
            )
        return sums

    return lax.fori_loop(0, num_rounds, run_round, softmax_tiles.no_sums())


def _update_state(
    context: TileContext,
    softmax_tile: SoftmaxTile,
    tokens: Tokens,
    is_first: Bool,
    scores: jax.Array,
    v: jax.Array,
    mask: Mask | None,
    is_end: bool,
) -> jax.Array:
    """Adds some keys to the state of a softmax tile.

    Args:
      context: Of the phase.
      softmax_tile: Which.
      tokens: The keys.
      is_first: Whether they are the first ones for their queries.
      scores: f32[rows, tokens], not masked.
      v: Their values.
      mask: If some query does not see all of them.
      is_end: Whether the code of a round ends with it.

    Returns:
      f32[8, 128]: what is in range only if the sums of all rows are.
    """
    config = context.config
    before = softmax_tiles.load_state(context, softmax_tile)
    start = softmax_tiles.start_state(context, softmax_tile)
    m, l, acc = (  # noqa: E741
        ints.where(is_first, new, old) for new, old in zip(start, before, strict=True)
    )

    def masked(scores: jax.Array, tokens: Tokens) -> jax.Array:
        if mask is None:
            return scores
        is_seen = softmax_tiles.visible_pairs(context, mask.cell, tokens, softmax_tile)
        return jnp.where(is_seen, scores, online_softmax.MASKED_SCORE)

    value_dtype = config.numerics.value_dtype
    if mask is not None and _has_running_maximum(context):
        p, m, correction = online_softmax.probabilities(masked(scores, tokens), m)
        l, acc = online_softmax.accumulate(  # noqa: E741
            p, v, correction, l, acc, value_dtype
        )
        checked = l
    else:
        anchor = m
        if is_first is not False:
            first_keys = tokens._replace(number=min(ANCHOR_KEYS, tokens.number))
            first_scores = masked(scores[:, : first_keys.number], first_keys)
            anchor = ints.where(
                is_first, online_softmax.anchor(first_scores, start.m), m
            )
        if config.spec.has_sinks and is_first is not False:
            # Only the sink was summed before the first block.
            l = l * jnp.exp2(m - anchor)  # noqa: E741
        p = online_softmax.probabilities_at(scores, anchor)
        visible_bits = mask and softmax_tiles.visible_bits(context, softmax_tile)
        row_sum, weighted = online_softmax.sum_and_weigh(
            p, v, config.lanes, value_dtype, visible_bits
        )
        # The last products of a round come late, and a branch waits for the check: so
        # it is given what is known before, and at least as large.
        is_early = is_end and mask is None and config.numerics.sums_in_matrix_unit
        checked = l + (online_softmax.spread_sums(p) if is_early else row_sum)
        m, l, acc = anchor, l + row_sum, acc + weighted  # noqa: E741
    softmax_tiles.store_state(context, softmax_tile, SoftmaxState(m, l, acc))
    return checked.reshape(-1, SUBLANES, LANES).sum(axis=0)

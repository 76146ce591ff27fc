"""One cell of prefill or mixed: a tile of queries meets a block of keys and values.

A tile has *query rows*: those of a key head are its G query heads, each with its
``block_q`` tokens, row = g * block_q + t. A *softmax tile* is some of them.

The softmax tiles of all cells are one pipeline: the scores of the next one are
computed before the softmax and the values of the present one. So a cell is received,
its queries and new tokens put in place, while the one before it is still to be
computed.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_kernels.ragged_paged_attention.kernel import (
    masking,
    online_softmax,
    tile_io,
)
from jax_kernels.ragged_paged_attention.kernel.block_loads import (
    largest_divisor,
    load_keys,
    load_values,
    value_words_mask,
)
from jax_kernels.ragged_paged_attention.kernel.online_softmax import SoftmaxState
from jax_kernels.ragged_paged_attention.kernel.schedule import (
    Cell,
    Int,
)
from jax_kernels.ragged_paged_attention.kernel.tiles.buffers import (
    ONLY_SLOT,
    TileContext,
)
from jax_kernels.ragged_paged_attention.layout import LANES, dtype_packing

# Softmax tiles in one stretch of code, within which the compiler overlaps them.
MAX_STRETCH_TILES = 16
# The same where masks are needed, which is rare: less code to compile.
MAX_MASKED_STRETCH_TILES = 8
# Masked stretches exist in multiples of this size, in tokens, and up to this number.
MIN_MASKED_STEP = 256
MAX_MASKED_STRETCHES = 4


class Place(NamedTuple):
    """Where a received cell is."""

    slot: Int  # of its keys and values
    query_slot: Int  # of its prepared queries


class SoftmaxTile(NamedTuple):
    """Some query rows of one key head."""

    head: Int
    number: int


def prepare_queries(context: TileContext, query_slot: Int) -> None:
    """Splits a tile by key head, applies the multiplier and casts, once per tile."""
    config, block_q = context.config, context.phase.block_q
    packing = dtype_packing(config.io_dtype)
    source = context.rings.queries.at[ONLY_SLOT]
    rows = tile_io.WordRows(source, config.interpret)
    stride = source.shape[-3]
    for pair in range(config.num_q_heads // packing):
        words = rows.load(pair, block_q, stride)
        for offset, x in enumerate(tile_io.unpack_heads(words, packing)):
            head, member = divmod(pair * packing + offset, config.group)
            place = pl.ds(member * block_q, block_q)
            x = tile_io.prepare_queries(tile_io.widen(x, config.lanes), config)
            context.buffers.q[query_slot, head, place, :] = x


def store_output(context: TileContext) -> None:
    """Normalises a tile and lays it out as ``[tokens, heads, head_dim]``."""
    config, buffers = context.config, context.buffers
    block_q = context.phase.block_q
    packing = dtype_packing(config.out_dtype)
    target = context.rings.out.at[ONLY_SLOT]
    rows = tile_io.WordRows(target, config.interpret)
    stride = target.shape[-3]
    for pair in range(config.num_q_heads // packing):
        heads = []
        for offset in range(packing):
            head, member = divmod(pair * packing + offset, config.group)
            place = 0, head, pl.ds(member * block_q, block_q)
            state = SoftmaxState(buffers.m[place], buffers.l[place], buffers.acc[place])
            out = online_softmax.normalise(state, config.numerics.output_scale)
            heads.append(tile_io.value_lanes_first(out, config.cache))
        words = tile_io.pack_heads(heads, config.interpret)[:, : config.io_lanes]
        rows.store(words, pair, stride)


def attend(
    context: TileContext,
    cell: Cell,
    here: Place,
    following: Place,
    plan: Callable[[], Any],
    when_empty: Callable[[], None],
) -> Any:
    """Attends the queries of a cell, and plans a later one on the way.

    A cell without queries only starts the pipeline of softmax tiles.

    Args:
      context: Of the phase.
      cell: The cell.
      here: Its place.
      following: The place of the following cell, which has been received.
      plan: Plans a cell; runs in the shadow of the computation.
      when_empty: More to do for a cell without queries.

    Returns:
      The result of ``plan``.
    """
    stretches: list[Callable[[], None]] = [
        functools.partial(_attend_stretch, context, cell, here, following, stretch)
        for stretch in _stretches(context)
    ]

    @stretches.append
    def _():
        when_empty()
        _score_ahead(context, following, 0)

    def with_plan(stretch: Callable[[], None]) -> Any:
        stretch()
        # Before the stretch it would delay the addresses of the first keys.
        return plan()

    return lax.switch(
        jnp.where(
            cell.num_queries > 0, _choose_stretch(context, cell), len(stretches) - 1
        ),
        [functools.partial(with_plan, stretch) for stretch in stretches],
    )


class Stretch(NamedTuple):
    """Code for the first tokens of a block, within which the compiler overlaps."""

    size: int  # tokens
    is_masked: bool


def _stretches(context: TileContext) -> list[Stretch]:
    """The stretches that there are; first the most frequent one."""
    block_kv, step = context.phase.block_kv, _masked_step(context)
    sizes = range(step, block_kv + 1, step)
    return [Stretch(block_kv, False)] + [Stretch(size, True) for size in sizes]


def _masked_step(context: TileContext) -> int:
    """Tokens by which the sizes of masked stretches differ."""
    block_kv = context.phase.block_kv
    return min(max(MIN_MASKED_STEP, block_kv // MAX_MASKED_STRETCHES), block_kv)


def _choose_stretch(context: TileContext, cell: Cell) -> jax.Array:
    """Index of the stretch for a cell."""
    extent = cell.visible_end - cell.block_start
    smallest = jnp.int32(1)
    for stretch in _stretches(context)[1:-1]:
        smallest += (extent > stretch.size).astype(jnp.int32)
    is_masked = masking.needs_mask(cell, context.phase.block_kv, context.config.spec)
    return jnp.where(is_masked, smallest, 0)


def _attend_stretch(
    context: TileContext, cell: Cell, here: Place, following: Place, stretch: Stretch
) -> None:
    """Scores, softmax and values of the first tokens of a block, for all heads.

    The source order is the pipeline: the scores of the next softmax tile are
    computed before the softmax and the values of the present one, so that the
    matrix units and the vector units have work at the same time. After the last
    tile of a round, which takes some heads, comes the first of the next round, or of
    the following cell; its scores wait in a buffer.
    """
    config, buffers = context.config, context.buffers
    size, is_masked = stretch
    num_softmax_tiles = config.query_rows(context.phase) // buffers.scores.shape[0]
    most_softmax_tiles = MAX_MASKED_STRETCH_TILES if is_masked else MAX_STRETCH_TILES
    round_heads = largest_divisor(
        config.num_kv_heads, max(most_softmax_tiles // num_softmax_tiles, 1)
    )
    is_first = cell.block == 0
    words_mask, first_masked = None, size
    if is_masked:
        first_masked = masking.num_visible_to_all(
            size,
            _masked_step(context),
            context.phase.block_q,
            config.spec,
        )
        words_mask = value_words_mask(
            cell.visible_begin - cell.block_start,
            cell.visible_end - cell.block_start,
            size,
            config,
            first=first_masked,
        )

    def run_round(index: Int, _) -> None:
        first = index * round_heads
        softmax_tiles = [
            SoftmaxTile(first + offset, number)
            for offset in range(round_heads)
            for number in range(num_softmax_tiles)
        ]
        next_scores = buffers.scores[:, :size]
        for softmax_tile, following_tile in zip(
            softmax_tiles, [*softmax_tiles[1:], None], strict=True
        ):
            scores = next_scores
            if following_tile is not None:
                next_scores = _scores(context, here, following_tile, size)
            else:
                next_head = first + round_heads
                is_done = next_head == config.num_kv_heads
                slot, query_slot = (
                    jnp.where(is_done, after, before)
                    for before, after in zip(here, following, strict=True)
                )
                next_head = jnp.where(is_done, 0, next_head)
                _score_ahead(context, Place(slot, query_slot), next_head)
            if is_masked:
                scores = _masked(context, cell, softmax_tile, first_masked, scores)
            kv = context.rings.kv.at[here.slot]
            v = load_values(
                kv, softmax_tile.head, size, words_mask, config, few_queries=False
            )
            _update_state(context, softmax_tile, is_first, scores, v)

    lax.fori_loop(0, config.num_kv_heads // round_heads, run_round, None)


def _update_state(
    context: TileContext,
    softmax_tile: SoftmaxTile,
    is_first: jax.Array,
    scores: jax.Array,
    v: jax.Array,
) -> None:
    """Softmax and values of one softmax tile."""
    config, buffers = context.config, context.buffers
    state = _load_state(context, softmax_tile, is_first)
    p, m, correction = online_softmax.probabilities(scores, state.m)
    if config.numerics.sums_in_matrix_unit:
        v = online_softmax.with_ones(v)
    l, acc = online_softmax.accumulate(  # noqa: E741
        p, v, correction, state.l, state.acc, config.numerics.value_dtype
    )
    rows = _state_rows(context, softmax_tile)
    buffers.m[rows], buffers.l[rows], buffers.acc[rows] = m, l, acc


def _load_state(
    context: TileContext, softmax_tile: SoftmaxTile, is_first: jax.Array
) -> SoftmaxState:
    """The state of a softmax tile, or the one to start from."""
    config, buffers = context.config, context.buffers
    rows = _state_rows(context, softmax_tile)
    start_m, start_l = online_softmax.NO_KEY_MAX, 0.0
    if config.spec.has_sinks:
        start_m, start_l = _sink_logits(context, softmax_tile), 1.0
    return SoftmaxState(
        m=jnp.where(is_first, start_m, buffers.m[rows]),
        l=jnp.where(is_first, start_l, buffers.l[rows]),
        acc=jnp.where(is_first, 0.0, buffers.acc[rows]),
    )


def _sink_logits(context: TileContext, softmax_tile: SoftmaxTile) -> jax.Array:
    """f32[rows, 128]: a sink counts as one key with its logit and a zero value."""
    config, block_q = context.config, context.phase.block_q
    num_rows = context.buffers.scores.shape[0]
    # The piece of a query head's rows that one softmax tile has.
    piece = math.gcd(block_q, num_rows)
    members = range(
        softmax_tile.number * num_rows, (softmax_tile.number + 1) * num_rows, piece
    )
    logits = [
        online_softmax.sink_logit(
            context.inputs.sinks[softmax_tile.head * config.group + row // block_q]
        )
        for row in members
    ]
    return jnp.concatenate(
        [jnp.full((piece, LANES), logit, jnp.float32) for logit in logits]
    )


def _state_rows(context: TileContext, softmax_tile: SoftmaxTile):
    """Index of a softmax tile in the state."""
    num_rows = context.buffers.scores.shape[0]
    return 0, softmax_tile.head, pl.ds(softmax_tile.number * num_rows, num_rows)


def _score_ahead(context: TileContext, place: Place, head: Int) -> None:
    """Scores of the first softmax tile of a head, for the stretch that comes next."""
    size = context.phase.block_kv
    context.buffers.scores[...] = _scores(context, place, SoftmaxTile(head, 0), size)


def _scores(
    context: TileContext, place: Place, softmax_tile: SoftmaxTile, size: int
) -> jax.Array:
    """f32[rows, size] of one softmax tile."""
    _, _, rows = _state_rows(context, softmax_tile)
    return online_softmax.score_tile(
        context.buffers.q[place.query_slot, softmax_tile.head, rows],
        load_keys(
            context.rings.kv.at[place.slot],
            softmax_tile.head,
            size,
            context.config,
            few_queries=False,
        ),
        context.config.numerics,
    )


def _masked(
    context: TileContext,
    cell: Cell,
    softmax_tile: SoftmaxTile,
    first: int,
    scores: jax.Array,
) -> jax.Array:
    """Scores of one softmax tile, masked from token ``first`` on."""
    size = scores.shape[1]
    mask = _visible_pairs(context, cell, softmax_tile, first, size)
    masked = jnp.where(mask, scores[:, first:], online_softmax.MASKED_SCORE)
    return jnp.concatenate([scores[:, :first], masked], axis=1) if first else masked


def _visible_pairs(
    context: TileContext, cell: Cell, softmax_tile: SoftmaxTile, first: int, size: int
) -> jax.Array:
    """bool[rows, size - first]: the pairs of one softmax tile that are visible."""
    num_rows = context.buffers.scores.shape[0]
    row = (
        lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0)
        + softmax_tile.number * num_rows
    )
    token = row & (context.phase.block_q - 1)
    key = first + lax.broadcasted_iota(jnp.int32, (1, size - first), 1)
    return masking.attention_mask(
        cell.query_position + token,
        cell.block_start + key,
        cell.visible_end,
        context.config.spec,
    )

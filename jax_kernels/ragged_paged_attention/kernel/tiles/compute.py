"""One cell of prefill or mixed: a tile of queries meets a block of keys and values.

The rows of a tile are the G query heads of one key head, each with its ``block_q``
tokens: row = g * block_q + t. A *softmax tile* is some rows of one key head.

The softmax tiles of all cells are one pipeline: the scores of the next tile are
computed before the softmax and the values of the present one. So a cell is received,
its queries and new tokens put in place, while the one before it is still to be
computed.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_kernels.ragged_paged_attention.config import LOG2_E
from jax_kernels.ragged_paged_attention.kernel import (
    masking,
    new_tokens,
    online_softmax,
    refs,
    tile_io,
)
from jax_kernels.ragged_paged_attention.kernel.block_loads import (
    largest_divisor,
    load_keys,
    load_values,
    value_words_mask,
)
from jax_kernels.ragged_paged_attention.kernel.online_softmax import SoftmaxState
from jax_kernels.ragged_paged_attention.kernel.phase import Copies
from jax_kernels.ragged_paged_attention.kernel.refs import ONLY_SLOT
from jax_kernels.ragged_paged_attention.kernel.schedule import (
    Cell,
    Int,
    log2,
    next_slot,
)
from jax_kernels.ragged_paged_attention.kernel.tiles.fetch import (
    Progress,
    load_cell,
    slot_of_same_block,
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


def process(
    copies: Copies,
    here: Place,
    has_following: jax.Array,
    start_queries: Callable[[], None],
    start: Callable[[], None],
    plan: Callable[[], Progress],
    when_empty: Callable[[], None],
) -> tuple[Place, Progress]:
    """Receives the following cell, then computes the one that is here.

    A cell without queries only starts the pipeline for the following one.

    Args:
      copies: The copies of the phase.
      here: The place of a received cell.
      has_following: Whether there is one more.
      start_queries: Starts to fetch the queries of the cell after the following one.
      start: Starts its other DMAs.
      plan: Plans the one after that; runs in the shadow of the computation.
      when_empty: More to do for a cell without queries.

    Returns:
      The place of the following cell, and what ``plan`` returns.
    """
    phase = copies.schedule.phase
    cell = load_cell(copies.bookkeeping.notes, here.slot)
    is_last = (cell.num_queries > 0) & (cell.block + 1 >= cell.num_blocks)
    following = Place(
        next_slot(here.slot, phase.num_slots),
        next_slot(here.query_slot, refs.NUM_QUERY_SLOTS, is_last),
    )
    pl.when(has_following)(lambda: _receive(copies, following, start_queries))
    start()

    stretches: list[Callable[[], None]] = [
        functools.partial(_attend, copies, cell, here, following, size, is_masked)
        for size, is_masked in _stretches(copies)
    ]

    @stretches.append
    def _():
        when_empty()
        _score_ahead(copies, following, 0)

    def with_plan(stretch: Callable[[], None]) -> Progress:
        stretch()
        # Before the stretch it would delay the addresses of the first keys.
        return plan()

    planned = lax.switch(
        jnp.where(
            cell.num_queries > 0, _choose_stretch(copies, cell), len(stretches) - 1
        ),
        [functools.partial(with_plan, stretch) for stretch in stretches],
    )

    @pl.when(is_last)
    def _():
        copies.wait_output(ONLY_SLOT)
        _store_output(copies)
        copies.start_output(ONLY_SLOT, cell.query_token, cell.num_queries)

    return following, planned


def _receive(copies: Copies, here: Place, start_queries: Callable[[], None]) -> None:
    """Waits for a fetched cell and puts its queries and new tokens in place."""
    cell = load_cell(copies.bookkeeping.notes, here.slot)

    @pl.when((cell.block == 0) & (cell.num_queries > 0))
    def _():
        copies.wait_queries(cell)
        _prepare_queries(copies, here.query_slot)

    start_queries()
    copies.wait_block(cell, here.slot)
    if copies.carries:

        @pl.when(cell.new_begin > cell.carried_begin)
        def _():
            source = slot_of_same_block(copies, cell, here.slot)
            new_tokens.carry(copies, cell, here.slot, source)

    if copies.updates:

        @pl.when(cell.new_end > cell.new_begin)
        def _():
            new_tokens.merge(copies, cell, here.slot)

        _carry_seam(copies, cell, here.slot)

        @pl.when(cell.write_row_end > cell.write_row_begin)
        def _():
            copies.start_write_back(cell, here.slot)


def _prepare_queries(copies: Copies, query_slot: Int) -> None:
    """Splits a tile by key head, applies the multiplier and casts, once per tile."""
    config, block_q = copies.config, copies.schedule.phase.block_q
    packing = dtype_packing(config.io_dtype)
    source = copies.buffers.queries.at[ONLY_SLOT]
    rows = tile_io.WordRows(source, config.interpret)
    stride = source.shape[-3]
    for pair in range(config.num_q_heads // packing):
        words = rows.load(pair, block_q, stride)
        for offset, x in enumerate(tile_io.unpack_heads(words, packing)):
            head, member = divmod(pair * packing + offset, config.group)
            place = pl.ds(member * block_q, block_q)
            x = tile_io.prepare_queries(tile_io.widen(x, config.lanes), config)
            copies.buffers.q[query_slot, head, place, :] = x


def _store_output(copies: Copies) -> None:
    """Normalises a tile and lays it out as ``[tokens, heads, head_dim]``."""
    config, buffers = copies.config, copies.buffers
    block_q = copies.schedule.phase.block_q
    packing = dtype_packing(config.out_dtype)
    target = buffers.out.at[ONLY_SLOT]
    rows = tile_io.WordRows(target, config.interpret)
    stride = target.shape[-3]
    for pair in range(config.num_q_heads // packing):
        heads = []
        for offset in range(packing):
            head, member = divmod(pair * packing + offset, config.group)
            place = 0, head, pl.ds(member * block_q, block_q)
            state = SoftmaxState(buffers.m[place], buffers.l[place], buffers.acc[place])
            out = online_softmax.normalise(state, config.output_scale)
            heads.append(tile_io.value_lanes_first(out, config.cache))
        words = tile_io.pack_heads(heads, config.interpret)[:, : config.io_lanes]
        rows.store(words, pair, stride)


def _carry_seam(copies: Copies, cell: Cell, slot: Int) -> None:
    """Keeps the row of old and new tokens for the later tiles of the sequence."""
    seam = copies.buffers.seam
    if seam is None:
        return
    packing = copies.config.cache.packing
    row = (cell.new_start >> log2(packing)) - (cell.block_start >> log2(packing))
    has_seam = (cell.new_start & (packing - 1)) != 0
    in_block = (row >= 0) & (row < copies.schedule.block_rows)
    many_tiles = (cell.num_tiles > 1) & (cell.num_queries > 0)
    row_ref = copies.buffers.kv.at[slot, :, pl.ds(jnp.maximum(row, 0), 1)]

    @pl.when(has_seam & in_block & many_tiles)
    def _():
        @pl.when(cell.tile == 0)
        def _():
            seam[...] = row_ref[...]

        @pl.when(cell.tile > 0)
        def _():
            row_ref[...] = seam[...]


def _stretches(copies: Copies) -> list[tuple[int, bool]]:
    """(tokens, whether masked) of each stretch; first the most frequent one."""
    block_kv, step = copies.schedule.phase.block_kv, _masked_step(copies)
    sizes = range(step, block_kv + 1, step)
    return [(block_kv, False)] + [(size, True) for size in sizes]


def _masked_step(copies: Copies) -> int:
    """Tokens by which the sizes of masked stretches differ."""
    block_kv = copies.schedule.phase.block_kv
    return min(max(MIN_MASKED_STEP, block_kv // MAX_MASKED_STRETCHES), block_kv)


def _choose_stretch(copies: Copies, cell: Cell) -> jax.Array:
    """Index of the stretch for a cell."""
    extent = cell.visible_end - cell.block_start
    smallest = jnp.int32(1)
    for size, _ in _stretches(copies)[1:-1]:
        smallest += (extent > size).astype(jnp.int32)
    is_masked = masking.needs_mask(
        cell, copies.schedule.phase.block_kv, copies.config.spec
    )
    return jnp.where(is_masked, smallest, 0)


def _attend(
    copies: Copies,
    cell: Cell,
    here: Place,
    following: Place,
    size: int,
    is_masked: bool,
) -> None:
    """Scores, softmax and values of the first ``size`` tokens, for all heads.

    The source order is the pipeline: the scores of the next softmax tile are
    computed before the softmax and the values of the present one, so that the
    matrix units and the vector units have work at the same time. After the last
    tile of a group of heads comes the first of the next group, or of the following
    cell; its scores wait in a buffer.
    """
    config, buffers = copies.config, copies.buffers
    num_tiles = config.query_rows(copies.schedule.phase) // buffers.scores.shape[0]
    most_tiles = MAX_MASKED_STRETCH_TILES if is_masked else MAX_STRETCH_TILES
    group_heads = largest_divisor(config.num_kv_heads, max(most_tiles // num_tiles, 1))
    is_first = cell.block == 0
    words_mask, first_masked = None, size
    if is_masked:
        first_masked = masking.num_visible_to_all(
            size,
            _masked_step(copies),
            copies.schedule.phase.block_q,
            config.spec,
        )
        words_mask = value_words_mask(
            cell.visible_begin - cell.block_start,
            cell.visible_end - cell.block_start,
            size,
            config,
            first=first_masked,
        )

    def group(index: Int, _) -> None:
        first = index * group_heads
        tiles = [
            (first + offset, tile)
            for offset in range(group_heads)
            for tile in range(num_tiles)
        ]
        next_scores = buffers.scores[:, :size]
        for tile, next_tile in zip(tiles, [*tiles[1:], None], strict=True):
            scores = next_scores
            if next_tile is not None:
                next_scores = _scores(copies, here, *next_tile, size)
            else:
                next_head = first + group_heads
                is_done = next_head == config.num_kv_heads
                slot, query_slot = (
                    jnp.where(is_done, after, before)
                    for before, after in zip(here, following, strict=True)
                )
                next_head = jnp.where(is_done, 0, next_head)
                _score_ahead(copies, Place(slot, query_slot), next_head)
            if is_masked:
                scores = _masked(copies, cell, tile[1], first_masked, scores)
            kv = buffers.kv.at[here.slot]
            v = load_values(kv, tile[0], size, words_mask, config, few_queries=False)
            _update_state(copies, tile, is_first, scores, v)

    lax.fori_loop(0, config.num_kv_heads // group_heads, group, None)


def _update_state(
    copies: Copies,
    tile: tuple[Int, int],
    is_first: jax.Array,
    scores: jax.Array,
    v: jax.Array,
) -> None:
    """Softmax and values of one softmax tile, given as (key head, number)."""
    config, buffers = copies.config, copies.buffers
    state = _load_state(copies, tile, is_first)
    p, m, correction = online_softmax.probabilities(scores, state.m)
    if config.sums_in_matrix_unit:
        v = online_softmax.with_ones(v)
    l, acc = online_softmax.accumulate(  # noqa: E741
        p, v, correction, state.l, state.acc, config.value_dtype
    )
    rows = _tile_rows(copies, tile)
    buffers.m[rows], buffers.l[rows], buffers.acc[rows] = m, l, acc


def _load_state(
    copies: Copies, tile: tuple[Int, int], is_first: jax.Array
) -> SoftmaxState:
    """The state of a softmax tile, or the one to start from."""
    config, buffers = copies.config, copies.buffers
    rows = _tile_rows(copies, tile)
    start_m, start_l = online_softmax.NO_KEY_MAX, 0.0
    if config.spec.has_sinks:
        start_m, start_l = _sink_logits(copies, tile), 1.0
    return SoftmaxState(
        m=jnp.where(is_first, start_m, buffers.m[rows]),
        l=jnp.where(is_first, start_l, buffers.l[rows]),
        acc=jnp.where(is_first, 0.0, buffers.acc[rows]),
    )


def _sink_logits(copies: Copies, tile: tuple[Int, int]) -> jax.Array:
    """f32[rows, 128]: a sink counts as one key with its logit and a zero value."""
    config, block_q = copies.config, copies.schedule.phase.block_q
    num_rows = copies.buffers.scores.shape[0]
    head, number = tile
    # The piece of a query head's rows that one softmax tile has.
    piece = math.gcd(block_q, num_rows)
    members = range(number * num_rows, (number + 1) * num_rows, piece)
    logits = [
        copies.inputs.sinks[head * config.group + row // block_q] * LOG2_E
        for row in members
    ]
    return jnp.concatenate(
        [jnp.full((piece, LANES), logit, jnp.float32) for logit in logits]
    )


def _tile_rows(copies: Copies, tile: tuple[Int, int]):
    """Index of a softmax tile in the state."""
    head, number = tile
    num_rows = copies.buffers.scores.shape[0]
    return 0, head, pl.ds(number * num_rows, num_rows)


def _score_ahead(copies: Copies, place: Place, head: Int) -> None:
    """Scores of the first softmax tile of a head, for the stretch that comes next."""
    size = copies.schedule.phase.block_kv
    copies.buffers.scores[...] = _scores(copies, place, head, 0, size)


def _scores(
    copies: Copies, place: Place, head: Int, number: int, size: int
) -> jax.Array:
    """f32[rows, size] of one softmax tile."""
    _, _, rows = _tile_rows(copies, (head, number))
    return online_softmax.score_tile(
        copies.buffers.q[place.query_slot, head, rows],
        load_keys(
            copies.buffers.kv.at[place.slot],
            head,
            size,
            copies.config,
            few_queries=False,
        ),
        copies.config.spec,
    )


def _masked(
    copies: Copies, cell: Cell, number: int, first: int, scores: jax.Array
) -> jax.Array:
    """Scores of one softmax tile, masked from token ``first`` on."""
    size = scores.shape[1]
    mask = _tile_mask(copies, cell, number, first, size)
    masked = jnp.where(mask, scores[:, first:], online_softmax.MASKED_SCORE)
    return jnp.concatenate([scores[:, :first], masked], axis=1) if first else masked


def _tile_mask(
    copies: Copies, cell: Cell, number: int, first: int, size: int
) -> jax.Array:
    """bool[rows, size - first]: the pairs of one softmax tile that are visible."""
    num_rows = copies.buffers.scores.shape[0]
    row = lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0) + number * num_rows
    token = row & (copies.schedule.phase.block_q - 1)
    key = first + lax.broadcasted_iota(jnp.int32, (1, size - first), 1)
    return masking.attention_mask(
        cell.query_position + token,
        cell.block_start + key,
        cell.visible_end,
        copies.config.spec,
    )

"""Scores, softmax and values of some tokens of a block: code that is not interrupted.

In a *stretch* of code the compiler overlaps the products of one softmax tile with the
softmax of another: scores are computed one softmax tile ahead.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_kernels.ragged_paged_attention.config import MASKED_TOKENS, SUBLANES
from jax_kernels.ragged_paged_attention.kernel import ints, online_softmax
from jax_kernels.ragged_paged_attention.kernel.ints import Bool
from jax_kernels.ragged_paged_attention.kernel.online_softmax import (
    ANCHOR_KEYS,
    SoftmaxState,
)
from jax_kernels.ragged_paged_attention.kernel.schedule import Cell, Int
from jax_kernels.ragged_paged_attention.kernel.tiles import softmax_tiles
from jax_kernels.ragged_paged_attention.kernel.tiles.buffers import TileContext
from jax_kernels.ragged_paged_attention.kernel.tiles.softmax_tiles import (
    SoftmaxTile,
    Tokens,
)
from jax_kernels.ragged_paged_attention.layout import LANES


class Mask(NamedTuple):
    """What of some tokens takes part."""

    cell: Cell  # whose queries see some of them
    words: jax.Array  # as in ``block_loads.load_values``


def has_running_maximum(context: TileContext) -> bool:
    """Whether blocks with a mask have one: their first keys may give no anchor."""
    return context.config.spec.hides_first_keys


def attend(
    context: TileContext,
    slot: Int,
    tokens: Tokens,
    is_first: Bool,
    tiles: list[SoftmaxTile],
    first_scores: jax.Array,
    mask: Mask | None = None,
    at_end: Callable[[], None] | None = None,
) -> jax.Array:
    """Scores, softmax and values of some tokens, for some softmax tiles.

    Args:
      context: Of the phase.
      slot: Of the keys and values.
      tokens: Which.
      is_first: Whether they are the first ones for their queries.
      tiles: The softmax tiles.
      first_scores: Scores of the first one.
      mask: If some query does not see all of the tokens.
      at_end: What the last softmax tile overlaps with.

    Returns:
      f32[8, 128]: what is in range only if the sums of all rows are.
    """
    sums, later_scores = softmax_tiles.no_sums(), first_scores
    for number, softmax_tile in enumerate(tiles):
        scores = later_scores
        is_end = number + 1 == len(tiles)
        if not is_end:
            later_scores = softmax_tiles.scores(
                context, slot, tokens, tiles[number + 1]
            )
        elif at_end is not None:
            at_end()
        v = softmax_tiles.values(
            context, slot, softmax_tile.head, tokens, mask and mask.words
        )
        sums += _update_state(
            context, softmax_tile, tokens, is_first, scores, v, mask, is_end
        )
    return sums


def attend_tiles(
    context: TileContext,
    slot: Int,
    tokens: Tokens,
    is_first: Bool,
    score_next_round: Callable[[Int], None] | None = None,
    mask: Mask | None = None,
) -> jax.Array:
    """The same for all softmax tiles, in rounds of as many as fit a stretch.

    Args:
      context: Of the phase.
      slot: Of the keys and values.
      tokens: Which.
      is_first: Whether they are the first ones for their queries.
      score_next_round: Computes the scores that wait for what comes after a round.
      mask: If some query does not see all of them.
    """
    round_heads = softmax_tiles.round_heads(context)
    num_rounds = context.config.num_kv_heads // round_heads
    # Only the first scores of a cell wait for its chunks.
    are_waiting = score_next_round is not None or num_rounds == 1

    def run_round(index: Int, sums: jax.Array) -> jax.Array:
        tiles = softmax_tiles.tiles_of_heads(context, index * round_heads, round_heads)
        scores = (
            softmax_tiles.waiting_scores(context, tokens)
            if are_waiting
            else softmax_tiles.scores(context, slot, tokens, tiles[0])
        )
        at_end = score_next_round and functools.partial(score_next_round, index)
        return sums + attend(
            context, slot, tokens, is_first, tiles, scores, mask, at_end
        )

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
    if mask is not None and has_running_maximum(context):
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
        # The last products of a round come late, and a branch waits for the check: so
        # it is given what is known before, and at least as large.
        is_early = is_end and mask is None and config.numerics.sums_in_matrix_unit
        checked = l + online_softmax.spread_sums(p) if is_early else None
        for piece in _pieces(context, tokens):
            row_sum, weighted = online_softmax.sum_and_weigh(
                p[:, piece],
                v[piece],
                config.lanes,
                value_dtype,
                None if visible_bits is None else visible_bits[:, piece],
            )
            m, l, acc = anchor, l + row_sum, acc + weighted  # noqa: E741
        checked = l if checked is None else checked
    softmax_tiles.store_state(context, softmax_tile, SoftmaxState(m, l, acc))
    return checked.reshape(-1, SUBLANES, LANES).sum(axis=0)


def _pieces(context: TileContext, tokens: Tokens) -> list[slice]:
    """The tokens whose sums are added at once, in order.

    With ``batch_invariant`` they are as many in each block and chunk, so that sums come
    in one order wherever masks are needed.
    """
    size = tokens.number
    if context.config.spec.batch_invariant:
        size = min(size, MASKED_TOKENS)
    return [slice(i, i + size) for i in range(0, tokens.number, size)]

"""The query rows that go through the softmax together: their scores and their state.

A tile has *query rows*: those of a key head are its G query heads, each with its
``block_q`` tokens, row = g * block_q + t. A *softmax tile* is some of them.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_kernels.ragged_paged_attention.kernel import masking, online_softmax
from jax_kernels.ragged_paged_attention.kernel.block_loads import load_keys, load_values
from jax_kernels.ragged_paged_attention.kernel.online_softmax import SoftmaxState
from jax_kernels.ragged_paged_attention.kernel.schedule import Cell, Int, log2
from jax_kernels.ragged_paged_attention.kernel.tiles.buffers import TileContext
from jax_kernels.ragged_paged_attention.layout import LANES


class Place(NamedTuple):
    """Where a received cell is."""

    slot: Int  # of its keys and values
    query_slot: Int  # of its prepared queries


class SoftmaxTile(NamedTuple):
    """Some query rows of one key head."""

    head: Int
    first_row: Int
    num_rows: int


class Tokens(NamedTuple):
    """Some tokens of a block, from a whole register of packed rows on."""

    first: Int
    number: int


def scores(
    context: TileContext, place: Place, tokens: Tokens, softmax_tile: SoftmaxTile
) -> jax.Array:
    """f32[rows, tokens], not masked."""
    config = context.config
    _, head, rows = _state_index(softmax_tile)
    return online_softmax.score_tile(
        context.buffers.q[place.query_slot, head, rows],
        load_keys(
            context.rings.kv.at[place.slot],
            head,
            tokens.number,
            config,
            few_queries=False,
            first_row=_first_row(context, tokens),
        ),
        config.numerics,
    )


def values(
    context: TileContext,
    place: Place,
    head: Int,
    tokens: Tokens,
    words_mask: jax.Array | None,
) -> jax.Array:
    """[tokens, lanes], with columns of ones behind them where those give the sums.

    Arguments are as in ``block_loads.load_values``.
    """
    v = load_values(
        context.rings.kv.at[place.slot],
        head,
        tokens.number,
        words_mask,
        context.config,
        few_queries=False,
        first_row=_first_row(context, tokens),
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
    buffers, index = context.buffers, _state_index(softmax_tile)
    return SoftmaxState(buffers.m[index], buffers.l[index], buffers.acc[index])


def store_state(
    context: TileContext, softmax_tile: SoftmaxTile, state: SoftmaxState
) -> None:
    buffers, index = context.buffers, _state_index(softmax_tile)
    buffers.m[index], buffers.l[index], buffers.acc[index] = state


def visible_pairs(
    context: TileContext, cell: Cell, tokens: Tokens, softmax_tile: SoftmaxTile
) -> jax.Array:
    """bool[rows, tokens]: which query sees which key.

    Rows without a query see what the last query sees, so that they meet no dead key.
    """
    row = lax.broadcasted_iota(jnp.int32, (softmax_tile.num_rows, 1), 0)
    token = (row + softmax_tile.first_row) & (context.phase.block_q - 1)
    key = lax.broadcasted_iota(jnp.int32, (1, tokens.number), 1)
    return masking.attention_mask(
        cell.query_position + jnp.minimum(token, cell.num_queries - 1),
        cell.block_start + tokens.first + key,
        cell.visible_end,
        context.config.spec,
    )


def _state_index(softmax_tile: SoftmaxTile):
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
    head, first_row, num_rows = softmax_tile
    # The piece of a query head's rows that one softmax tile has.
    piece = math.gcd(block_q, num_rows)
    members = [(first_row + row) >> log2(block_q) for row in range(0, num_rows, piece)]
    logits = [
        online_softmax.sink_logit(context.inputs.sinks[head * config.group + member])
        for member in members
    ]
    return jnp.concatenate(
        [jnp.full((piece, LANES), logit, jnp.float32) for logit in logits]
    )

"""Rows whose scores went too far above their anchor.

Their sums are out of range after a block. This is rare, so the code is small rather
than fast: it has the arithmetic of the running maximum.
"""

from jax_kernels.ragged_paged_attention.kernel import online_softmax
from jax_kernels.ragged_paged_attention.kernel.block_loads import value_words_mask
from jax_kernels.ragged_paged_attention.kernel.ints import Int
from jax_kernels.ragged_paged_attention.kernel.online_softmax import SoftmaxState
from jax_kernels.ragged_paged_attention.kernel.schedule import Cell
from jax_kernels.ragged_paged_attention.kernel.tiles import softmax_tiles
from jax_kernels.ragged_paged_attention.kernel.tiles.buffers import TileContext
from jax_kernels.ragged_paged_attention.kernel.tiles.softmax_tiles import (
    SoftmaxTile,
    Tokens,
)


def recover(context: TileContext, cell: Cell, slot: Int) -> None:
    """Brings all sums of a cell, whose block was just added, into range again.

    Rows whose sum was lost are computed again from this block alone. What they had
    summed before is less than the rounding of what made the sum overflow.
    """
    config = context.config
    block = Tokens(0, context.phase.block_kv)
    words_mask = value_words_mask(
        cell.visible_begin - cell.block_start,
        cell.visible_end - cell.block_start,
        block.number,
        config,
    )

    def recover_rows(softmax_tile: SoftmaxTile) -> None:
        before = softmax_tiles.load_state(context, softmax_tile)
        state = online_softmax.whole_sums(before)
        is_left = online_softmax.is_left(state.l)
        is_lost = online_softmax.is_lost(state.l)
        start = softmax_tiles.start_state(context, softmax_tile)
        state = online_softmax.choose_rows(is_lost, start, state)
        p, m, correction = online_softmax.probabilities(
            softmax_tiles.scores_of_lost_rows(
                context, cell, slot, softmax_tile, is_lost
            ),
            state.m,
        )
        l, acc = online_softmax.accumulate(  # noqa: E741
            p,
            softmax_tiles.values(context, slot, softmax_tile.head, block, words_mask),
            correction,
            state.l,
            state.acc,
            config.numerics.value_dtype,
        )
        state = online_softmax.whole_sums(SoftmaxState(m, l, acc))
        state = online_softmax.renormalised(state)
        if config.spec.batch_invariant:
            state = online_softmax.choose_rows(is_left, before, state)
        softmax_tiles.store_state(context, softmax_tile, state)

    softmax_tiles.recover_pieces(context, recover_rows)

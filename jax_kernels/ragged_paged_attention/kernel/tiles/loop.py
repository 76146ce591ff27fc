"""The loop of prefill and mixed: a cell is computed while the next is received."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_kernels.ragged_paged_attention.kernel import notes
from jax_kernels.ragged_paged_attention.kernel.schedule import (
    EMPTY_CELL,
    Int,
    next_slot,
)
from jax_kernels.ragged_paged_attention.kernel.tiles import compute, new_tokens, parts
from jax_kernels.ragged_paged_attention.kernel.tiles.buffers import (
    ONLY_SLOT,
    TileContext,
    allocate,
)
from jax_kernels.ragged_paged_attention.kernel.tiles.copies import TileCopies
from jax_kernels.ragged_paged_attention.kernel.tiles.fetch import (
    Fetcher,
    Progress,
    load_cell,
)

__all__ = ["allocate", "run"]


def run(
    context: TileContext, begin: Int, end: Int, after_first_fetches: Callable[[], None]
) -> None:
    """Computes the sequences begin .. end; at least one.

    It begins one step early, at an empty cell, and so receives the first.
    """
    notes.forget_writes(context.bookkeeping)
    copies = TileCopies(context)
    fetcher = Fetcher(context, copies, end)

    def is_unfinished(carry):
        num_done, _, progress = carry
        return num_done < progress.num_cells

    def run_step(carry):
        num_done, slot, progress = carry
        following, progress = _process(
            context,
            copies,
            fetcher,
            slot,
            progress,
            has_following=num_done + 1 < progress.num_cells,
            when_empty=functools.partial(pl.when(num_done < 0), after_first_fetches),
        )
        return num_done + 1, following, progress

    last_slot = jnp.int32(context.phase.num_slots - 1)
    notes.store(context.bookkeeping.notes, last_slot, EMPTY_CELL)
    progress = fetcher.begin(begin)
    fetcher.start(progress)
    fetcher.start_queries(progress)
    progress = fetcher.plan(progress)
    lax.while_loop(is_unfinished, run_step, (jnp.int32(-1), last_slot, progress))
    copies.wait_all_writes()


def _process(
    context: TileContext,
    copies: TileCopies,
    fetcher: Fetcher,
    slot: Int,
    progress: Progress,
    has_following: jax.Array,
    when_empty: Callable[[], None],
) -> tuple[Int, Progress]:
    """Receives the block of the following cell, then computes the cell in a slot.

    Args:
      context: Of the phase.
      copies: Its copies.
      fetcher: Starts the cell after the following one, and plans the one after that.
      slot: That of a received cell.
      progress: That of the fetcher.
      has_following: Whether there is one more.
      when_empty: More to do for a cell without queries.

    Returns:
      The slot of the following cell, and the progress of the fetcher.
    """
    cell = load_cell(context, slot)
    is_last = (cell.num_queries > 0) & (cell.block + 1 >= cell.num_blocks)
    following_slot = next_slot(slot, context.phase.num_slots)

    @pl.when(has_following)
    def _():
        _receive_block(context, copies, following_slot)

    fetcher.start(progress)
    planned = compute.attend(
        context,
        cell,
        slot,
        following_slot,
        plan=functools.partial(fetcher.plan, progress),
        when_empty=when_empty,
    )

    following = load_cell(context, following_slot)
    begins = has_following & (following.block == 0) & (following.num_queries > 0)

    @pl.when(begins)
    def _():
        copies.wait_queries(following)

    is_at_once = is_last & compute.are_ends_at_once(context, cell, following)

    @pl.when(is_at_once)
    def _():
        copies.wait_output(ONLY_SLOT)
        # One stretch for three things, of which the scores take the matrix units. What
        # there is no following tile for is not used.
        compute.prepare_queries(context, following.num_queries)
        compute.score_ahead(context, following_slot)
        compute.store_output(context)
        copies.start_output(ONLY_SLOT, cell.query_token, cell.num_queries)

    has_scored = jnp.logical_not(is_last) & compute.is_whole(context, cell)

    @pl.when(jnp.logical_not(is_at_once | has_scored))
    def _():
        @pl.when(begins)
        def _():
            compute.prepare_queries(context, following.num_queries, by_part=True)

        compute.score_following(context, following, following_slot)

        if parts.number(context) > 1:

            @pl.when(is_last)
            def _():
                copies.wait_output(ONLY_SLOT)
                compute.store_output_by_part(context, cell.num_queries)
                copies.start_output(ONLY_SLOT, cell.query_token, cell.num_queries)

    fetcher.start_queries(progress)
    return following_slot, planned


def _receive_block(context: TileContext, copies: TileCopies, slot: Int) -> None:
    """Waits for the block of a fetched cell and puts its new tokens in place."""
    cell = load_cell(context, slot)
    copies.wait_block(cell, slot)
    if context.carries:

        @pl.when(cell.new_begin > cell.carried_begin)
        def _():
            new_tokens.carry(context, cell, slot)

    if context.updates:

        @pl.when(cell.new_end > cell.new_begin)
        def _():
            new_tokens.merge(context, copies, cell, slot)

        new_tokens.carry_seam(context, cell, slot)

        @pl.when(cell.write_row_end > cell.write_row_begin)
        def _():
            copies.start_write_back(cell, slot)

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
from jax_kernels.ragged_paged_attention.kernel.tiles import compute, new_tokens
from jax_kernels.ragged_paged_attention.kernel.tiles.buffers import (
    NUM_QUERY_SLOTS,
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
from jax_kernels.ragged_paged_attention.kernel.tiles.softmax_tiles import Place

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
        num_done, here, progress = carry
        following, progress = _process(
            context,
            copies,
            fetcher,
            here,
            progress,
            has_following=num_done + 1 < progress.num_cells,
            when_empty=functools.partial(pl.when(num_done < 0), after_first_fetches),
        )
        return num_done + 1, following, progress

    last_slot = jnp.int32(context.phase.num_slots - 1)
    notes.store(context.bookkeeping.notes, last_slot, EMPTY_CELL)
    here = Place(slot=last_slot, query_slot=jnp.int32(0))
    progress = fetcher.begin(begin)
    fetcher.start_queries(progress)
    fetcher.start(progress)
    progress = fetcher.plan(progress)
    lax.while_loop(is_unfinished, run_step, (jnp.int32(-1), here, progress))
    copies.wait_all_writes()


def _process(
    context: TileContext,
    copies: TileCopies,
    fetcher: Fetcher,
    here: Place,
    progress: Progress,
    has_following: jax.Array,
    when_empty: Callable[[], None],
) -> tuple[Place, Progress]:
    """Receives the following cell, then computes the one that is here.

    Args:
      context: Of the phase.
      copies: Its copies.
      fetcher: Starts the cell after the following one, and plans the one after that.
      here: The place of a received cell.
      progress: That of the fetcher.
      has_following: Whether there is one more.
      when_empty: More to do for a cell without queries.

    Returns:
      The place of the following cell, and the progress of the fetcher.
    """
    cell = load_cell(context, here.slot)
    is_last = (cell.num_queries > 0) & (cell.block + 1 >= cell.num_blocks)
    following = Place(
        next_slot(here.slot, context.phase.num_slots),
        next_slot(here.query_slot, NUM_QUERY_SLOTS, is_last),
    )

    @pl.when(has_following)
    def _():
        _receive(context, copies, fetcher, following, progress)

    fetcher.start(progress)
    planned = compute.attend(
        context,
        cell,
        here,
        plan=functools.partial(fetcher.plan, progress),
        when_empty=when_empty,
    )

    @pl.when(is_last)
    def _():
        copies.wait_output(ONLY_SLOT)
        compute.store_output(context)
        copies.start_output(ONLY_SLOT, cell.query_token, cell.num_queries)

    return following, planned


def _receive(
    context: TileContext,
    copies: TileCopies,
    fetcher: Fetcher,
    here: Place,
    progress: Progress,
) -> None:
    """Waits for a fetched cell and puts its queries and new tokens in place."""
    cell = load_cell(context, here.slot)

    @pl.when((cell.block == 0) & (cell.num_queries > 0))
    def _():
        copies.wait_queries(cell)
        compute.prepare_queries(context, here.query_slot, cell.num_queries)

    fetcher.start_queries(progress)
    copies.wait_block(cell, here.slot)
    if context.carries:

        @pl.when(cell.new_begin > cell.carried_begin)
        def _():
            new_tokens.carry(context, cell, here.slot)

    if context.updates:

        @pl.when(cell.new_end > cell.new_begin)
        def _():
            new_tokens.merge(context, copies, cell, here.slot)

        new_tokens.carry_seam(context, cell, here.slot)

        @pl.when(cell.write_row_end > cell.write_row_begin)
        def _():
            copies.start_write_back(cell, here.slot)

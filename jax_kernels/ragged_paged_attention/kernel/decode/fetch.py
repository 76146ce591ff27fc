"""The fetching side of decode: which step is next, and its DMAs.

Planning a step is scalar arithmetic and a note in SMEM, so the compiler can run it in
the shadow of vector work. Starting it issues its DMAs, which the compiler keeps in
order with everything around them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jax_kernels.ragged_paged_attention.kernel import notes
from jax_kernels.ragged_paged_attention.kernel.decode.buffers import (
    DecodeContext,
    hold_copies_back,
)
from jax_kernels.ragged_paged_attention.kernel.decode.copies import StepCopies
from jax_kernels.ragged_paged_attention.kernel.decode.steps import (
    DecodeCell,
    Step,
    StepCursor,
    cell_structure,
    describe_step,
    step_structure,
)
from jax_kernels.ragged_paged_attention.kernel.schedule import Int, next_slot


class Progress(NamedTuple):
    """How far the fetching side is."""

    cursor: StepCursor  # of the first cell that is not planned
    num_planned: Int  # steps with a live cell
    num_started: Int
    slot: Int  # of the next step to start


@dataclasses.dataclass(frozen=True)
class Fetcher:
    """Plans and starts one step after the other, of sequences up to ``end``."""

    context: DecodeContext
    copies: StepCopies
    end: Int

    def begin(self, sequence: Int) -> Progress:
        """Nothing is planned; the first step begins at a sequence."""
        zero = jnp.int32(0)
        return Progress(StepCursor(jnp.int32(sequence), zero), zero, zero, zero)

    def plan(self, progress: Progress) -> Progress:
        """Notes the step at the cursor, and moves the cursor behind it."""
        context = self.context
        numbers = context.bookkeeping.notes
        per_cell = cell_structure(context.schedule).num_leaves
        first = progress.slot * step_structure(context.schedule).num_leaves

        def keep(index: int, cell: DecodeCell) -> None:
            # At once, or the numbers of all cells would be spilled until the end.
            notes.store_at(numbers, first + index * per_cell, cell)

        is_live = progress.cursor.sequence < self.end
        step, cursor = describe_step(
            context.schedule,
            progress.cursor,
            self.end,
            functools.partial(notes.read_lengths, context.scalars),
            keep,
        )
        totals = step._replace(cells=())
        notes.store_at(numbers, first + len(step.cells) * per_cell, totals)
        return progress._replace(
            cursor=cursor,
            num_planned=progress.num_planned + is_live.astype(jnp.int32),
        )

    def start(self, progress: Progress, *, with_pages: bool) -> Progress:
        """Starts the DMAs of the planned step, if there is one.

        Without the pages, these are left to ``Shadow.start_pages``.
        """
        context, slot = self.context, progress.slot
        self.copies.wait_output(slot)
        if context.updates:
            self.copies.wait_write_back(slot)
        is_live = progress.num_planned > progress.num_started

        @pl.when(is_live)
        def _():
            step = load_step(context, slot)
            self.copies.start_tokens(step, slot)
            if with_pages:
                for index in range(len(step.cells)):
                    self.copies.start_pages(step, slot, index)

        return progress._replace(
            num_started=progress.num_planned,
            slot=next_slot(slot, context.phase.num_slots, is_live),
        )


class PlannedPages(NamedTuple):
    """The pages of a step that was planned, and waits to be fetched."""

    copies: StepCopies
    step: Step
    slot: Int

    def start(self, cell: int, *, unrolled: bool) -> None:
        """Fetches the pages of one of its cells."""
        self.copies.start_pages(self.step, self.slot, cell, unrolled=unrolled)


@dataclasses.dataclass(frozen=True)
class Shadow:
    """What is done for later steps in the shadow of the vector work of one.

    Attributes:
      plan: Plans a step; gives how far the fetching side is then.
      pages: Of the step that was planned before, or None if they are under way.
    """

    plan: Callable[[], Progress]
    pages: PlannedPages | None = None

    def start_all_pages(self) -> "Shadow":
        """Starts all pages at once, in loops; gives what is left to do."""
        if self.pages is not None:
            for cell in range(len(self.pages.step.cells)):
                self.pages.start(cell, unrolled=False)
        return Shadow(self.plan)

    def start_pages(self, index: int, maximum: jax.Array) -> None:
        """Starts some pages beside the work that follows on the softmax of a cell.

        Args:
          index: Number of the cell. The first half of them get two cells' pages each.
          maximum: f32[query rows, 128], the maximum of the scores up to the cell. It is
            known before most of the work of the cell is done.
        """
        if self.pages is None:
            return
        num_cells = len(self.pages.step.cells)
        # Also after the last pages, or these would start after everything else.
        if 2 * (index - 1) < num_cells:
            hold_copies_back(self.pages.copies.context, maximum)
        for cell in range(2 * index, min(2 * index + 2, num_cells)):
            self.pages.start(cell, unrolled=True)


def load_step(context: DecodeContext, slot: Int) -> Step:
    """The step that is noted for a slot."""
    structure = step_structure(context.schedule)
    return notes.load(context.bookkeeping.notes, slot, structure)

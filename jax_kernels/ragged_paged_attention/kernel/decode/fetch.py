"""The fetching side of decode: which step is next, and its DMAs.

Planning a step is scalar arithmetic and a note in SMEM, so the compiler can run it in
the shadow of vector work. Starting it issues its DMAs, which the compiler keeps in
order with everything around them.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from jax_kernels.ragged_paged_attention.kernel import notes
from jax_kernels.ragged_paged_attention.kernel.decode.buffers import DecodeContext
from jax_kernels.ragged_paged_attention.kernel.decode.copies import StepCopies
from jax_kernels.ragged_paged_attention.kernel.decode.steps import (
    Step,
    describe_step,
    step_structure,
)
from jax_kernels.ragged_paged_attention.kernel.schedule import (
    Cursor,
    Int,
    next_slot,
)


class Progress(NamedTuple):
    """How far the fetching side is."""

    cursor: Cursor  # of the first cell that is not planned
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
        return Progress(Cursor(jnp.int32(sequence), zero, zero), zero, zero, zero)

    def plan(self, progress: Progress) -> Progress:
        """Notes the step at the cursor, and moves the cursor behind it."""
        context = self.context
        is_live = progress.cursor.sequence < self.end
        step, cursor = describe_step(
            context.schedule,
            progress.cursor,
            self.end,
            functools.partial(notes.read_lengths, context.scalars),
        )
        notes.store(context.bookkeeping.notes, progress.slot, step)
        return progress._replace(
            cursor=cursor,
            num_planned=progress.num_planned + is_live.astype(jnp.int32),
        )

    def start(self, progress: Progress) -> Progress:
        """Starts the DMAs of the planned step, if there is one."""
        context, slot = self.context, progress.slot
        self.copies.wait_output(slot)
        if context.updates:
            self.copies.wait_write_back(slot)
        is_live = progress.num_planned > progress.num_started

        @pl.when(is_live)
        def _():
            self.copies.start(load_step(context, slot), slot)

        return progress._replace(
            num_started=progress.num_planned,
            slot=next_slot(slot, context.phase.num_slots, is_live),
        )


def load_step(context: DecodeContext, slot: Int) -> Step:
    """The step that is noted for a slot."""
    structure = step_structure(context.phase)
    return notes.load(context.bookkeeping.notes, slot, structure)

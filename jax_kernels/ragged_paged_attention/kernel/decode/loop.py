"""The loop of decode: plans steps (steps.py), starts their DMAs, computes them.

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
from jax import lax
from jax.experimental import pallas as pl

from jax_kernels.ragged_paged_attention.kernel.decode import compute
from jax_kernels.ragged_paged_attention.kernel.decode.steps import (
    Step,
    describe_step,
    step_structure,
)
from jax_kernels.ragged_paged_attention.kernel.phase import StepCopies
from jax_kernels.ragged_paged_attention.kernel.schedule import (
    Cursor,
    Int,
    Schedule,
    next_slot,
)
from jax_kernels.ragged_paged_attention.kernel.tiles.fetch import read_lengths


class Progress(NamedTuple):
    """How far the fetching side is."""

    cursor: Cursor  # of the first cell that is not planned
    num_planned: Int  # steps with a live cell
    num_started: Int
    slot: Int  # of the next step to start


@dataclasses.dataclass(frozen=True)
class Stepper:
    """Plans and starts one step after the other, of sequences up to ``end``."""

    copies: StepCopies
    end: Int

    @property
    def schedule(self) -> Schedule:
        return self.copies.schedule

    def begin(self, sequence: Int) -> Progress:
        zero = jnp.int32(0)
        return Progress(Cursor(jnp.int32(sequence), zero, zero), zero, zero, zero)

    def plan(self, progress: Progress) -> Progress:
        """Notes the step at the cursor, and moves the cursor behind it."""
        is_live = progress.cursor.sequence < self.end
        step, cursor = describe_step(
            self.schedule,
            progress.cursor,
            self.end,
            functools.partial(read_lengths, self.copies.scalars),
        )
        _store_step(self.copies, progress.slot, step)
        return progress._replace(
            cursor=cursor,
            num_planned=progress.num_planned + is_live.astype(jnp.int32),
        )

    def start(self, progress: Progress) -> Progress:
        """Starts the DMAs of the planned step, if there is one."""
        copies, slot = self.copies, progress.slot
        copies.wait_output(slot)
        if copies.updates:
            copies.wait_write_back(slot)
        is_live = progress.num_planned > progress.num_started

        @pl.when(is_live)
        def _():
            copies.start(_load_step(copies, slot), slot)

        return progress._replace(
            num_started=progress.num_planned,
            slot=next_slot(slot, self.schedule.phase.num_slots, is_live),
        )


def _store_step(copies: StepCopies, slot: Int, step: Step) -> None:
    leaves = jax.tree.leaves(step)
    for index, value in enumerate(leaves):
        copies.bookkeeping.notes[slot * len(leaves) + index] = jnp.asarray(
            value, jnp.int32
        )


def _load_step(copies: StepCopies, slot: Int) -> Step:
    structure = step_structure(copies.schedule.phase.cells_per_step)
    size = structure.num_leaves
    return jax.tree.unflatten(
        structure,
        [copies.bookkeeping.notes[slot * size + index] for index in range(size)],
    )


def run(
    copies: StepCopies, begin: Int, end: Int, after_first_fetches: Callable[[], None]
) -> None:
    """Computes the decode sequences begin .. end; at least one."""
    copies.reset()
    stepper, phase = Stepper(copies, end), copies.schedule.phase
    progress = lax.fori_loop(
        0,
        phase.lookahead,
        lambda _, progress: stepper.start(stepper.plan(progress)),
        stepper.begin(begin),
    )
    after_first_fetches()
    compute.prepare(copies)
    progress = stepper.plan(progress)

    def is_unfinished(carry):
        num_done, _, progress = carry
        return num_done < progress.num_started

    def run_step(carry):
        num_done, slot, progress = carry
        progress = stepper.start(progress)
        step = _load_step(copies, slot)
        copies.wait(step, slot)
        progress = compute.compute(
            copies, step.cells, slot, functools.partial(stepper.plan, progress)
        )
        if copies.updates:
            copies.start_write_back(step, slot)
        copies.start_outputs(step, slot)
        return num_done + 1, next_slot(slot, phase.num_slots), progress

    zero = jnp.int32(0)
    lax.while_loop(is_unfinished, run_step, (zero, zero, progress))
    copies.drain()

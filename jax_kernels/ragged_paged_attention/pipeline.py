"""The fetching side of the loop: which cell is next, and its DMAs.

Planning a cell is scalar arithmetic without side effects beyond a note in SMEM, so
it can run in the shadow of vector work. Starting it issues its DMAs. Both work on
the same ``Progress``; the computing side reads the notes.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_kernels.ragged_paged_attention import refs
from jax_kernels.ragged_paged_attention.dma import Copies
from jax_kernels.ragged_paged_attention.schedule import (
    Cell,
    Cursor,
    Int,
    Lengths,
    Schedule,
)


class Progress(NamedTuple):
    """How far the fetching side is."""

    cursor: Cursor  # of the next cell to plan
    is_planned: Int  # 1: the cell in slot ``num_cells`` is planned, not started
    num_cells: Int  # started
    num_tiles: Int  # started tiles with queries
    stored_end: Int  # see Schedule.describe


@dataclasses.dataclass(frozen=True)
class Fetcher:
    """Plans and starts cells of sequences up to ``end``."""

    copies: Copies
    end: Int

    @property
    def schedule(self) -> Schedule:
        return self.copies.schedule

    def begin(self, sequence: Int) -> Progress:
        zero = jnp.int32(0)
        return Progress(Cursor(jnp.int32(sequence), zero, zero), zero, zero, zero, zero)

    def plan(self, progress: Progress) -> Progress:
        """Notes the cell at the cursor, if there is one, and moves the cursor."""
        cursor = progress.cursor
        is_live = cursor.sequence < self.end
        # Past the end, the last sequence stands in and the result is not used.
        sequence = jnp.minimum(cursor.sequence, self.end - 1)
        cell = self.schedule.describe(
            cursor._replace(sequence=sequence),
            _read_lengths(self.copies.scalars, sequence),
            progress.stored_end,
        )
        store_cell(self.copies.bookkeeping.cells, self._slot(progress), cell)
        following = self.schedule.advance(cell)
        return progress._replace(
            cursor=jax.tree.map(
                lambda new, old: jnp.where(is_live, new, old), following, cursor
            ),
            is_planned=is_live.astype(jnp.int32),
            stored_end=jnp.where(
                following.sequence == sequence, progress.stored_end, 0
            ),
        )

    def reuse_slot(self, progress: Progress) -> Progress:
        """Waits until the slot of the next cell is free."""
        if not self.copies.config.spec.update_kv_cache:
            return progress
        slot = self._slot(progress)
        if not self.schedule.phase.is_decode:  # There nothing is read twice.
            earlier = load_cell(self.copies.bookkeeping.cells, slot)
            has_written = self.copies.bookkeeping.written_rows[slot] > 0
            is_same = earlier.sequence == progress.cursor.sequence
            progress = progress._replace(
                stored_end=jnp.where(
                    has_written & is_same,
                    self.schedule.written_end(earlier),
                    progress.stored_end,
                )
            )
        self.copies.wait_write_back(slot)
        return progress

    def start(self, progress: Progress) -> Progress:
        """Starts the DMAs of the planned cell, if there is one."""
        slot = self._slot(progress)
        cell = load_cell(self.copies.bookkeeping.cells, slot)
        is_live = progress.is_planned > 0
        is_first = is_live & (cell.block == 0) & (cell.num_queries > 0)

        @pl.when(is_live)
        def _():
            if self.copies.config.spec.update_kv_cache:
                self.copies.start_new_tokens(cell, slot)
            self.copies.start_block(cell, slot)

        @pl.when(is_first)
        def _():
            self.copies.start_queries(cell, self._ring(progress.num_tiles))

        return progress._replace(
            is_planned=jnp.int32(0),
            num_cells=progress.num_cells + progress.is_planned,
            num_tiles=progress.num_tiles + is_first.astype(jnp.int32),
        )

    def fetch(self, progress: Progress) -> Progress:
        """Plans and starts the next cell."""
        return self.start(self.plan(self.reuse_slot(progress)))

    def _slot(self, progress: Progress) -> Int:
        return self._ring(progress.num_cells)

    def _ring(self, count: Int) -> Int:
        return lax.rem(count, jnp.int32(self.schedule.phase.num_slots))


def store_cell(cells_ref, slot: Int, cell: Cell) -> None:
    for index, value in enumerate(cell):
        cells_ref[slot * len(cell) + index] = jnp.asarray(value, jnp.int32)


def load_cell(cells_ref, slot: Int) -> Cell:
    size = len(Cell._fields)
    return Cell(*(cells_ref[slot * size + index] for index in range(size)))


def _read_lengths(scalars: refs.ScalarRefs, sequence: Int) -> Lengths:
    q_start = scalars.cu_q_lens[sequence]
    return Lengths(
        q_start=q_start,
        q_len=scalars.cu_q_lens[sequence + 1] - q_start,
        kv_len=scalars.kv_lens[sequence],
    )

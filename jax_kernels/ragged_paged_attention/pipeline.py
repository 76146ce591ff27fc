"""The fetching side of the loop: which cell is next, and its DMAs.

Planning a cell is scalar arithmetic and a note in SMEM, so the compiler can run it in
the shadow of vector work. Starting it issues its DMAs, which the compiler keeps in
order with everything around them. The computing side reads the notes.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jax_kernels.ragged_paged_attention import refs
from jax_kernels.ragged_paged_attention.dma import Copies
from jax_kernels.ragged_paged_attention.schedule import (
    Cell,
    Cursor,
    Int,
    Lengths,
    Schedule,
    next_slot,
)


class Progress(NamedTuple):
    """How far the fetching side is."""

    cursor: Cursor  # of the next cell to plan
    is_planned: Int  # 1: the cell in ``slot`` is planned, not started
    num_cells: Int  # started
    slot: Int  # of the next cell to start
    tile_slot: Int  # of the next tile of queries to start
    stored_end: Int  # see Schedule.describe


@dataclasses.dataclass(frozen=True)
class Fetcher:
    """Starts the DMAs of one cell after the other, of sequences up to ``end``."""

    copies: Copies
    end: Int

    @property
    def schedule(self) -> Schedule:
        return self.copies.schedule

    def begin(self, sequence: Int) -> Progress:
        zero = jnp.int32(0)
        cursor = Cursor(jnp.int32(sequence), zero, zero)
        return Progress(cursor, zero, zero, zero, zero, zero)

    def fetch(self, progress: Progress) -> Progress:
        """Plans and starts the next cell, if there is one."""
        return self.start(self.plan(self.reuse_slot(progress)))

    def reuse_slot(self, progress: Progress) -> Progress:
        """Waits until the slot of the next cell is free."""
        if not self.copies.config.spec.update_kv_cache:
            return progress
        progress = progress._replace(stored_end=self._stored_end(progress))
        self.copies.wait_write_back(progress.slot)
        return progress

    def plan(self, progress: Progress) -> Progress:
        """Notes the cell at the cursor, if there is one, and moves the cursor."""
        cursor = progress.cursor
        is_live = cursor.sequence < self.end
        # Past the end, the last sequence stands in and its cell is not started.
        sequence = jnp.minimum(cursor.sequence, self.end - 1)
        lengths = _read_lengths(self.copies.scalars, sequence)
        cell = self.schedule.describe(
            cursor._replace(sequence=sequence), lengths, progress.stored_end
        )
        _store_cell(self.copies.bookkeeping.cells, progress.slot, cell)
        following = self.schedule.advance(cell)
        is_same = following.sequence == sequence
        return progress._replace(
            cursor=jax.tree.map(
                lambda new, old: jnp.where(is_live, new, old), following, cursor
            ),
            is_planned=is_live.astype(jnp.int32),
            stored_end=jnp.where(is_same, progress.stored_end, 0),
        )

    def start(self, progress: Progress) -> Progress:
        """Starts the DMAs of the planned cell, if there is one."""
        copies, slot, phase = self.copies, progress.slot, self.schedule.phase
        cell = load_cell(copies.bookkeeping.cells, slot)
        is_live = progress.is_planned > 0
        is_first = is_live & (cell.block == 0) & (cell.num_queries > 0)

        @pl.when(is_live)
        def _():
            if copies.config.spec.update_kv_cache:
                copies.start_new_tokens(cell, slot)
            copies.start_block(cell, slot)

        @pl.when(is_first)
        def _():
            copies.start_queries(cell, progress.tile_slot)

        return progress._replace(
            is_planned=jnp.int32(0),
            num_cells=progress.num_cells + progress.is_planned,
            slot=next_slot(slot, phase.num_slots, is_live),
            tile_slot=next_slot(progress.tile_slot, phase.num_tile_slots, is_first),
        )

    def _stored_end(self, progress: Progress) -> Int:
        """How far the sequence is stored once the write-back of the slot has ended."""
        if self.schedule.phase.is_decode:
            return progress.stored_end  # One new token, met once.
        slot = progress.slot
        earlier = load_cell(self.copies.bookkeeping.cells, slot)
        has_written = self.copies.bookkeeping.written_rows[slot] > 0
        return jnp.where(
            has_written & (earlier.sequence == progress.cursor.sequence),
            self.schedule.written_end(earlier),
            progress.stored_end,
        )


def _store_cell(cells_ref, slot: Int, cell: Cell) -> None:
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

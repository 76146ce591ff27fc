"""The fetching side of the loops over tiles: which cell is next, and its DMAs."""

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
    num_cells: Int  # started
    slot: Int  # of the next cell to start
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
        return Progress(cursor, zero, zero, zero)

    def fetch(self, progress: Progress) -> Progress:
        """Starts the DMAs of the cell at the cursor, if there is one."""
        copies, cursor, slot = self.copies, progress.cursor, progress.slot
        stored_end = progress.stored_end
        if copies.updates:
            stored_end = self._stored_end(progress)
            copies.wait_write_back(slot)
        is_live = cursor.sequence < self.end
        # Past the end, the last sequence stands in and its cell is not started.
        sequence = jnp.minimum(cursor.sequence, self.end - 1)
        lengths = read_lengths(copies.scalars, sequence)
        cell = self.schedule.describe(
            cursor._replace(sequence=sequence), lengths, stored_end
        )
        store_cell(copies.bookkeeping.notes, slot, cell)
        is_first = is_live & (cell.block == 0) & (cell.num_queries > 0)

        @pl.when(is_live)
        def _():
            if copies.updates:
                copies.start_new_tokens(cell)
            copies.start_block(cell, slot)

        @pl.when(is_first)
        def _():
            copies.start_queries(cell)

        phase, following = self.schedule.phase, self.schedule.advance(cell)
        return Progress(
            cursor=jax.tree.map(
                lambda new, old: jnp.where(is_live, new, old), following, cursor
            ),
            num_cells=progress.num_cells + is_live.astype(jnp.int32),
            slot=next_slot(slot, phase.num_slots, is_live),
            stored_end=jnp.where(following.sequence == sequence, stored_end, 0),
        )

    def _stored_end(self, progress: Progress) -> Int:
        """How far the sequence is stored once the write-back of the slot has ended."""
        slot = progress.slot
        earlier = load_cell(self.copies.bookkeeping.notes, slot)
        has_written = self.copies.bookkeeping.written_rows[slot] > 0
        return jnp.where(
            has_written & (earlier.sequence == progress.cursor.sequence),
            self.schedule.written_end(earlier),
            progress.stored_end,
        )


def store_cell(notes_ref, slot: Int, cell: Cell) -> None:
    for index, value in enumerate(cell):
        notes_ref[slot * len(cell) + index] = jnp.asarray(value, jnp.int32)


def load_cell(notes_ref, slot: Int) -> Cell:
    size = len(Cell._fields)
    return Cell(*(notes_ref[slot * size + index] for index in range(size)))


def read_lengths(scalars: refs.ScalarRefs, sequence: Int) -> Lengths:
    q_start = scalars.cu_q_lens[sequence]
    return Lengths(
        q_start=q_start,
        q_len=scalars.cu_q_lens[sequence + 1] - q_start,
        kv_len=scalars.kv_lens[sequence],
    )

"""The fetching side of the loops over tiles: which cell is next, and its DMAs."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jax_kernels.ragged_paged_attention.kernel import refs
from jax_kernels.ragged_paged_attention.kernel.phase import Copies
from jax_kernels.ragged_paged_attention.kernel.schedule import (
    Cell,
    Cursor,
    Int,
    Lengths,
    RecentBlock,
    Schedule,
    next_slot,
    slot_before,
)


class Progress(NamedTuple):
    """How far the fetching side is."""

    cursor: Cursor  # of the next cell to plan
    num_cells: Int  # planned
    num_live: Int  # 1 if the cell that was planned last exists, else 0
    slot: Int  # of that cell
    stored_end: Int  # see Schedule.describe


@dataclasses.dataclass(frozen=True)
class Fetcher:
    """Plans and starts one cell after the other, of sequences up to ``end``.

    A plan is scalar work and hides in the stretch of an earlier cell. DMAs do not: they
    keep their order with every access to the ring.
    """

    copies: Copies
    end: Int

    @property
    def schedule(self) -> Schedule:
        return self.copies.schedule

    def begin(self, sequence: Int) -> Progress:
        zero = jnp.int32(0)
        cursor = Cursor(jnp.int32(sequence), zero, zero)
        return self.plan(Progress(cursor, zero, zero, zero, zero))

    def plan(self, progress: Progress) -> Progress:
        """Notes the cell at the cursor as the next one to start, if there is one."""
        copies, cursor = self.copies, progress.cursor
        slot = next_slot(
            progress.slot, copies.schedule.phase.num_slots, progress.num_live > 0
        )
        stored_end = progress.stored_end
        if copies.updates:
            stored_end = self._stored_end(progress._replace(slot=slot))
        is_live = cursor.sequence < self.end
        # Past the end, the last sequence stands in and its cell is not started.
        sequence = jnp.minimum(cursor.sequence, self.end - 1)
        lengths = read_lengths(copies.scalars, sequence)
        cell = self.schedule.describe(
            cursor._replace(sequence=sequence),
            lengths,
            stored_end,
            self._recent_blocks(progress) if copies.carries else (),
        )
        store_cell(copies.bookkeeping.notes, self._planned, cell)
        following = self.schedule.advance(cell)
        return Progress(
            cursor=jax.tree.map(
                lambda new, old: jnp.where(is_live, new, old), following, cursor
            ),
            num_cells=progress.num_cells + is_live.astype(jnp.int32),
            num_live=is_live.astype(jnp.int32),
            slot=slot,
            stored_end=jnp.where(following.sequence == sequence, stored_end, 0),
        )

    def start_queries(self, progress: Progress) -> None:
        """Starts the fetch of the queries that the planned cell brings, if any.

        Apart from the rest, since their buffer is free again before that of new tokens.
        """
        copies = self.copies
        cell = load_cell(copies.bookkeeping.notes, self._planned)
        is_live = progress.num_live > 0

        @pl.when(is_live & (cell.block == 0) & (cell.num_queries > 0))
        def _():
            copies.start_queries(cell)

    def start(self, progress: Progress) -> None:
        """Starts the other DMAs of the planned cell, if there is one, and notes it."""
        copies, slot = self.copies, progress.slot
        if copies.updates:
            copies.wait_write_back(slot)
        cell = load_cell(copies.bookkeeping.notes, self._planned)
        store_cell(copies.bookkeeping.notes, slot, cell)

        @pl.when(progress.num_live > 0)
        def _():
            if copies.updates:
                copies.start_new_tokens(cell)
            copies.start_block(cell, slot)

    @property
    def _planned(self) -> int:
        """Where the notes have the planned cell: after the slots."""
        return self.schedule.phase.num_slots

    def _stored_end(self, progress: Progress) -> Int:
        """How far the sequence is stored once the write-back of the slot has ended.

        It has when the planned cell is started. Until then the notes of the slot are
        those of the cell that wrote it.
        """
        slot = progress.slot
        earlier = load_cell(self.copies.bookkeeping.notes, slot)
        has_written = self.copies.bookkeeping.written_rows[slot] > 0
        return jnp.where(
            has_written & (earlier.sequence == progress.cursor.sequence),
            self.schedule.written_end(earlier),
            progress.stored_end,
        )

    def _recent_blocks(self, progress: Progress) -> list[RecentBlock]:
        """What the other slots hold when the planned cell is received."""
        num_slots = self.schedule.phase.num_slots
        blocks = []
        for age in range(num_slots - 1):
            slot = slot_before(progress.slot, age, num_slots)
            block = load_block(self.copies.bookkeeping.notes, slot)
            exists = progress.num_cells > age
            blocks.append(
                block._replace(sequence=jnp.where(exists, block.sequence, -1))
            )
        return blocks


def slot_of_same_block(copies: Copies, cell: Cell, slot: Int) -> Int:
    """The slot of the last cell before this one that has the same block.

    Args:
      copies: Gives the notes.
      cell: A cell that is being received, and for which there is such a slot.
      slot: Its slot.
    """
    num_slots = copies.schedule.phase.num_slots
    found = slot
    for distance in reversed(range(1, num_slots)):
        earlier = slot_before(slot, distance, num_slots)
        block = load_block(copies.bookkeeping.notes, earlier)
        is_same = block.is_of(cell.sequence, cell.block_start)
        found = jnp.where(is_same, earlier, found)
    return found


def store_cell(notes_ref, slot: Int, cell: Cell) -> None:
    for index, value in enumerate(cell):
        notes_ref[slot * len(cell) + index] = jnp.asarray(value, jnp.int32)


def load_cell(notes_ref, slot: Int) -> Cell:
    size = len(Cell._fields)
    return Cell(*(notes_ref[slot * size + index] for index in range(size)))


def load_block(notes_ref, slot: Int) -> RecentBlock:
    cell = load_cell(notes_ref, slot)
    return RecentBlock(cell.sequence, cell.block_start, cell.new_end)


def read_lengths(scalars: refs.ScalarRefs, sequence: Int) -> Lengths:
    q_start = scalars.cu_q_lens[sequence]
    return Lengths(
        q_start=q_start,
        q_len=scalars.cu_q_lens[sequence + 1] - q_start,
        kv_len=scalars.kv_lens[sequence],
    )

"""The fetching side of prefill and mixed: which cell is next, and its DMAs.

Planning a cell is scalar work and hides in the stretch of an earlier one. Its DMAs do
not: they keep their order with every access to the ring.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jax_kernels.ragged_paged_attention.kernel import notes
from jax_kernels.ragged_paged_attention.kernel.schedule import (
    Cell,
    Cursor,
    Int,
    RecentBlock,
    next_slot,
    slot_before,
)
from jax_kernels.ragged_paged_attention.kernel.tiles.buffers import (
    CELL_STRUCTURE,
    TileContext,
)
from jax_kernels.ragged_paged_attention.kernel.tiles.copies import TileCopies


class Progress(NamedTuple):
    """How far the fetching side is."""

    cursor: Cursor  # of the next cell to plan
    num_cells: Int  # planned
    num_live: Int  # 1 if the cell that was planned last exists, else 0
    slot: Int  # of that cell
    stored_end: Int  # see Schedule.describe


@dataclasses.dataclass(frozen=True)
class Fetcher:
    """Plans and starts one cell after the other, of sequences up to ``end``."""

    context: TileContext
    copies: TileCopies
    end: Int

    def begin(self, sequence: Int) -> Progress:
        """The first cell of a sequence is planned."""
        zero = jnp.int32(0)
        cursor = Cursor(jnp.int32(sequence), zero, zero)
        return self.plan(Progress(cursor, zero, zero, zero, zero))

    def plan(self, progress: Progress) -> Progress:
        """Notes the cell at the cursor as the next one to start, if there is one."""
        context, cursor = self.context, progress.cursor
        slot = next_slot(progress.slot, context.phase.num_slots, progress.num_live > 0)
        stored_end = progress.stored_end
        if context.updates:
            stored_end = self._stored_end(progress._replace(slot=slot))
        is_live = cursor.sequence < self.end
        # Past the end, the last sequence stands in and its cell is not started.
        sequence = jnp.minimum(cursor.sequence, self.end - 1)
        lengths = notes.read_lengths(context.scalars, sequence)
        cell = self.context.schedule.describe(
            cursor._replace(sequence=sequence),
            lengths,
            stored_end,
            self._recent_blocks(progress) if context.carries else (),
        )
        notes.store(context.bookkeeping.notes, self._planned, cell)
        following = self.context.schedule.advance(cell)
        return Progress(
            cursor=jax.tree.map(
                lambda new, old: jnp.where(is_live, new, old), following, cursor
            ),
            num_cells=progress.num_cells + is_live.astype(jnp.int32),
            num_live=is_live.astype(jnp.int32),
            slot=slot,
            stored_end=jnp.where(following.sequence == sequence, stored_end, 0),
        )

    def start(self, progress: Progress) -> None:
        """Starts the DMAs of the planned cell, if there is one, and notes it.

        Its queries are not among them.
        """
        context, copies, slot = self.context, self.copies, progress.slot
        if context.updates:
            copies.wait_write_back(slot)
        cell = load_cell(context, self._planned)
        notes.store(context.bookkeeping.notes, slot, cell)

        @pl.when(progress.num_live > 0)
        def _():
            if context.updates:
                copies.start_new_tokens(cell)
            copies.start_block(cell, slot)

    def start_queries(self, progress: Progress) -> None:
        """Starts the fetch of the queries that a started cell brings, if any.

        Apart from the rest, since their buffer is free later.
        """
        cell = load_cell(self.context, progress.slot)
        is_live = progress.num_live > 0

        @pl.when(is_live & (cell.block == 0) & (cell.num_queries > 0))
        def _():
            self.copies.start_queries(cell)

    @property
    def _planned(self) -> int:
        """Where the notes have the planned cell: after the slots."""
        return self.context.phase.num_slots

    def _stored_end(self, progress: Progress) -> Int:
        """How far the sequence is stored once the write-back of the slot has ended.

        It has when the planned cell is started. Until then the notes of the slot are
        those of the cell that wrote it.
        """
        slot = progress.slot
        earlier = load_cell(self.context, slot)
        has_written = self.context.bookkeeping.written_rows[slot] > 0
        return jnp.where(
            has_written & (earlier.sequence == progress.cursor.sequence),
            self.context.schedule.written_end(earlier),
            progress.stored_end,
        )

    def _recent_blocks(self, progress: Progress) -> list[RecentBlock]:
        """What the other slots hold when the planned cell is received."""
        num_slots = self.context.phase.num_slots
        blocks = []
        for age in range(num_slots - 1):
            slot = slot_before(progress.slot, age, num_slots)
            block = load_block(self.context, slot)
            exists = progress.num_cells > age
            blocks.append(
                block._replace(sequence=jnp.where(exists, block.sequence, -1))
            )
        return blocks


def load_cell(context: TileContext, slot: Int) -> Cell:
    """The cell that is noted for a slot."""
    return notes.load(context.bookkeeping.notes, slot, CELL_STRUCTURE)


def load_block(context: TileContext, slot: Int) -> RecentBlock:
    """The block that a slot holds, by the notes."""
    cell = load_cell(context, slot)
    return RecentBlock(cell.sequence, cell.block_start, cell.new_end)

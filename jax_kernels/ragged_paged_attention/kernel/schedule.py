"""The order of work: a flat list of cells, and everything one cell needs to know.

A cell is one block of keys and values met by one tile of queries of one sequence.
The list is never stored. A cursor walks it, ``describe`` turns a cursor into a
``Cell`` and ``advance`` finds the next one. All functions are plain arithmetic on
ints, whether Python's or traced int32 scalars.

Worked example, ``block_q = 4``, ``block_kv = 8``, packing 2, causal, two sequences::

    sequence 0: q_len 6, kv_len 13      positions 7 .. 12 are new
    sequence 1: q_len 1, kv_len 3       position 2 is new

    cell  seq  tile  block   queries   keys attended   from the cache   new tokens
    0     0    0     0       7 .. 9    0 .. 7          0 .. 7           7
    1     0    0     1       7 .. 9    8 .. 9          -                8 .. 9
    2     0    1     0       10 .. 12  0 .. 7          0 .. 5           7 (and row 6)
    3     0    1     1       10 .. 12  8 .. 12         row 12           8 .. 12
    4     1    0     0       2         0 .. 2          0 .. 2           2

* Tiles start at packed rows (position 6, not 7, begins tile 0), so every packed row
  that is written belongs to exactly one tile.
* A token is read from the cache when it is old, or when this launch has written it
  and has seen the write end (``stored_end``). Any other new token comes from ``keys``
  and ``values`` again, or packed from the slot of an earlier cell with the same block
  (``recent``). So nothing is read while it is being written, and nothing waits.
  Above, no write has ended yet when cells 2 and 3 are issued, and nothing is carried.
* The row 6 | 7 holds an old and a new token (the *seam*). Tile 0 reads it, merges it
  and keeps it for later tiles, which must not read what tile 0 is writing.
* The row 12 | 13 holds a new token and a dead slot (the *tail*). The tile that
  writes it reads it first, so that the dead bytes stay as they were.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jax_kernels.ragged_paged_attention.config import (
    KernelConfig,
    Phase,
    PhaseConfig,
)

# A Python int in tests, a traced int32 scalar in the kernel. No type checker knows of
# a type that is both.
Int: TypeAlias = Any


class Lengths(NamedTuple):
    """The three numbers that describe a sequence."""

    q_start: Int  # first row in the flat query array
    q_len: Int
    kv_len: Int  # new tokens included


class Cursor(NamedTuple):
    """A place in the list of cells."""

    sequence: Int
    tile: Int
    block: Int


class BlockPlace(NamedTuple):
    """Where a block starts."""

    table_index: Int  # of its first page, in the flat page table
    page_row: Int  # its first row within that page


class Cell(NamedTuple):
    """One unit of work. Positions count tokens of the sequence from 0.

    Rows count packed rows from the start of the block. Ranges are half open.
    """

    sequence: Int
    tile: Int
    num_tiles: Int
    block: Int
    num_blocks: Int
    query_token: Int  # first row of the tile in the flat query array
    query_position: Int
    num_queries: Int  # 0: nothing to do
    new_start: Int  # position of the first new token of the sequence
    block_start: Int  # position of the first slot of the block
    visible_begin: Int  # first position that any query of the tile may see
    visible_end: Int
    cache_row_begin: Int  # rows fetched from the cache
    cache_row_end: Int
    tail_row: Int  # row fetched for the sake of its dead slots, or -1
    carried_begin: Int  # from here to new_begin, taken from a slot of an earlier cell
    new_begin: Int  # positions taken from keys and values
    new_end: Int
    write_row_begin: Int  # rows written back
    write_row_end: Int


class RecentBlock(NamedTuple):
    """The block of an earlier cell, whose slot of the ring is still whole."""

    sequence: Int
    block_start: Int
    new_end: Int  # the slot holds all visible positions of the block up to this one

    def is_of(self, sequence: Int, block_start: Int) -> jax.Array:
        """Whether it is the same block of the same sequence."""
        return (self.sequence == sequence) & (self.block_start == block_start)


# Nothing to fetch, to compute or to write.
EMPTY_CELL = Cell(*[0] * len(Cell._fields))


def log2(power_of_two: int) -> int:
    return power_of_two.bit_length() - 1


def floor_to(value: Int, power_of_two: int) -> Int:
    """Rounds down, also below zero: ``floor_to(-3, 4) == -4``."""
    return value & -power_of_two


def ceil_to(value: Int, power_of_two: int) -> Int:
    return (value + (power_of_two - 1)) & -power_of_two


def next_slot(slot: Int, num_slots: int, is_used: Int = True) -> Int:
    """The slot after this one in a ring, if this one was used."""
    wrapped = jnp.where(slot + 1 == num_slots, 0, slot + 1)
    return jnp.where(is_used, wrapped, slot)


def slot_before(slot: Int, distance: int, num_slots: int) -> Int:
    """The slot that was filled so many cells earlier, less than there are slots."""
    return jnp.where(slot >= distance, slot - distance, slot - distance + num_slots)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Cell arithmetic of one phase."""

    config: KernelConfig
    phase: PhaseConfig

    @property
    def block_rows(self) -> int:
        """Packed rows per block."""
        return self.phase.block_kv // self.config.cache.packing

    @property
    def anchor_step(self) -> int:
        """Blocks start at multiples of this, so no block splits a page it skips."""
        return min(self.config.cache.page_size, self.phase.block_kv)

    @property
    def block_is_one_page_part(self) -> bool:
        """Whether every block lies within one page."""
        return self.phase.block_kv <= self.config.cache.page_size

    def describe(
        self,
        cursor: Cursor,
        lengths: Lengths,
        stored_end: Int = 0,
        recent: Sequence[RecentBlock] = (),
    ) -> Cell:
        """The cell at a cursor.

        Args:
          cursor: The place in the list.
          lengths: The sequence at that place.
          stored_end: New tokens of the sequence before this position are known to be
            in the cache. 0: nothing is known. A multiple of the packing.
          recent: What the slots of earlier cells hold when this one is received.
        """
        spec, packing = self.config.spec, self.config.cache.packing
        block_kv = self.phase.block_kv
        kv_len = lengths.kv_len
        new_start = kv_len - lengths.q_len

        if self.phase.phase is Phase.DECODE:
            num_tiles = 1
            query_position = new_start
            num_queries = jnp.minimum(lengths.q_len, 1)
            tile_end = kv_len
        else:
            block_q = self.phase.block_q
            origin = floor_to(new_start, packing)
            num_tiles = jnp.maximum(
                lax.div(kv_len - origin + block_q - 1, jnp.int32(block_q)), 1
            )
            tile_begin = origin + cursor.tile * block_q
            tile_end = tile_begin + block_q
            query_position = jnp.maximum(new_start, tile_begin)
            num_queries = jnp.maximum(jnp.minimum(tile_end, kv_len) - query_position, 0)

        visible_end = jnp.minimum(tile_end, kv_len) if spec.causal else kv_len
        visible_end = jnp.where(num_queries > 0, jnp.maximum(visible_end, 0), 0)
        if spec.sliding_window is None:
            visible_begin, anchor = jnp.int32(0), jnp.int32(0)
        else:
            visible_begin = jnp.maximum(query_position - (spec.sliding_window - 1), 0)
            anchor = floor_to(visible_begin, self.anchor_step)
        num_blocks = jnp.maximum(
            ceil_to(visible_end - anchor, block_kv) >> log2(block_kv), 1
        )
        block_start = anchor + cursor.block * block_kv
        block_end = jnp.minimum(block_start + block_kv, visible_end)
        block_end = jnp.maximum(block_end, block_start)

        def to_row(position: Int) -> Int:
            return (position - block_start) >> log2(packing)

        # What the cache already holds, as far as this tile may read it.
        if not spec.update_kv_cache:
            old_end = ceil_to(visible_end, packing)
        elif self.phase.phase is Phase.DECODE:
            # One row at the most holds new or dead slots: read it with the rest.
            old_end = ceil_to(kv_len, packing)
        else:
            old_end = jnp.where(
                cursor.tile == 0,
                ceil_to(new_start, packing),
                jnp.maximum(floor_to(new_start, packing), stored_end),
            )
        cache_begin = jnp.maximum(floor_to(visible_begin, packing), block_start)
        cache_end = jnp.minimum(old_end, ceil_to(block_end, packing))
        cache_end = jnp.maximum(cache_end, cache_begin)

        tail_row = jnp.int32(-1)
        if spec.update_kv_cache:
            # The first tile meets each block once, so nothing of it is stored yet.
            known_end = jnp.where(cursor.tile == 0, 0, stored_end)
            carried_begin = jnp.maximum(jnp.maximum(new_start, block_start), known_end)
            new_begin = carried_begin
            for earlier in recent:
                is_same = earlier.is_of(cursor.sequence, block_start)
                carried_end = jnp.where(is_same, earlier.new_end, 0)
                new_begin = jnp.maximum(new_begin, carried_end)
            new_end = jnp.maximum(block_end, new_begin)
            # A causal tile owns its own positions. Otherwise the first tile meets
            # every key, so it owns them all.
            if spec.causal:
                owned_begin = jnp.maximum(query_position, 0)
                owned_end = visible_end
            else:
                owned_begin = jnp.maximum(new_start, 0)
                owned_end = jnp.where(cursor.tile == 0, visible_end, 0)
            write_begin = jnp.maximum(owned_begin, block_start)
            write_end = jnp.minimum(owned_end, block_end)
            writes = write_end > write_begin
            if self.phase.phase is not Phase.DECODE:
                tail = floor_to(kv_len, packing)
                has_tail = writes & (write_end == kv_len) & (tail < kv_len)
                tail_row = jnp.where(has_tail & (tail >= old_end), to_row(tail), -1)
            write_row_begin = jnp.where(writes, to_row(write_begin), 0)
            write_row_end = jnp.where(writes, to_row(ceil_to(write_end, packing)), 0)
        else:
            carried_begin = new_begin = new_end = jnp.int32(0)
            write_row_begin = write_row_end = jnp.int32(0)

        return Cell(
            sequence=cursor.sequence,
            tile=cursor.tile,
            num_tiles=num_tiles,
            block=cursor.block,
            num_blocks=num_blocks,
            query_token=lengths.q_start + (query_position - new_start),
            query_position=query_position,
            num_queries=num_queries,
            new_start=new_start,
            block_start=block_start,
            visible_begin=visible_begin,
            visible_end=visible_end,
            cache_row_begin=to_row(cache_begin),
            cache_row_end=to_row(cache_end),
            tail_row=tail_row,
            carried_begin=carried_begin,
            new_begin=new_begin,
            new_end=new_end,
            write_row_begin=write_row_begin,
            write_row_end=write_row_end,
        )

    def block_place(self, cell: Cell) -> BlockPlace:
        """Where the block of a cell is among the pages."""
        layout = self.config.cache
        first_page = cell.block_start >> log2(layout.page_size)
        row = 0
        if self.block_is_one_page_part:
            row = (cell.block_start & (layout.page_size - 1)) >> log2(layout.packing)
        return BlockPlace(
            cell.sequence * self.config.pages_per_sequence + first_page, row
        )

    def written_end(self, cell: Cell) -> Int:
        """The position after the rows that a cell writes, a multiple of the packing."""
        return cell.block_start + cell.write_row_end * self.config.cache.packing

    def advance(self, cell: Cell) -> Cursor:
        """The cursor of the cell after ``cell``; the sequence may be the next one."""
        block_done = cell.block + 1 >= cell.num_blocks
        tile_done = block_done & (cell.tile + 1 >= cell.num_tiles)
        return Cursor(
            sequence=jnp.where(tile_done, cell.sequence + 1, cell.sequence),
            tile=jnp.where(
                tile_done, 0, jnp.where(block_done, cell.tile + 1, cell.tile)
            ),
            block=jnp.where(block_done, 0, cell.block + 1),
        )

"""The order of work of tiles: a list of cells, and everything one cell needs to know.

A cell is one block of keys and values met by one tile of queries of one sequence.
The list is never stored. A cursor walks it, ``describe`` turns a cursor into a
``Cell`` and ``advance`` finds the next one. All functions are arithmetic on scalars
(ints.py): Python ints in, Python ints out; in the kernel they are traced int32.

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
* The row 12 | 13 holds a new token and a dead position (the *tail*). The tile that
  writes it reads it first, so that the dead bytes stay as they were.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from jax_kernels.ragged_paged_attention.config import (
    KernelConfig,
    PhaseConfig,
)
from jax_kernels.ragged_paged_attention.kernel import ints
from jax_kernels.ragged_paged_attention.kernel.ints import (
    Bool,
    Int,
    ceil_to,
    floor_to,
    log2,
)


class Lengths(NamedTuple):
    """The three numbers that describe a sequence."""

    q_start: Int  # first token in the flat query array
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
    query_token: Int  # first token of the tile in the flat query array
    query_position: Int
    num_queries: Int  # 0: nothing to do
    new_start: Int  # position of the first new token of the sequence
    block_start: Int  # first position of the block
    visible_begin: Int  # first position that any query of the tile may see
    visible_end: Int  # the one after the last; new tokens may be behind it
    cache_row_begin: Int  # rows fetched from the cache
    cache_row_end: Int
    tail_row: Int  # row fetched for the sake of its dead positions, or -1
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

    def is_of(self, sequence: Int, block_start: Int) -> Bool:
        """Whether it is the same block of the same sequence."""
        return (self.sequence == sequence) & (self.block_start == block_start)


# Nothing to fetch, to compute or to write.
EMPTY_CELL = Cell(*[0] * len(Cell._fields))


class Range(NamedTuple):
    """Positions of a sequence, half open. Empty if the end is not after the begin."""

    begin: Int
    end: Int


class Tile(NamedTuple):
    """Which of the new tokens of a sequence are the queries of a tile."""

    index: Int
    num_tiles: Int  # of the sequence
    query_position: Int
    num_queries: Int
    end: Int  # position where the next tile begins


class Block(NamedTuple):
    """A block of keys and values, as far as the tile that meets it needs it."""

    num_blocks: Int  # that the tile meets
    start: Int  # first position
    end: Int  # position after the last that it has; at least ``start``


class NewTokens(NamedTuple):
    """The new tokens of a block that the cache does not give yet, as positions.

    The first are taken from the slot of an earlier cell, the others from the arrays.
    """

    carried_begin: Int
    begin: Int
    end: Int


class WriteBack(NamedTuple):
    """The rows of a block that are written, and the one that is read for that."""

    row_begin: Int
    row_end: Int
    tail_row: Int  # see ``Cell``


NO_NEW_TOKENS = NewTokens(0, 0, 0)
NO_WRITE_BACK = WriteBack(0, 0, tail_row=-1)


def next_slot(slot: Int, num_slots: int, is_used: Bool = True) -> Int:
    """The slot after this one in a ring, if this one was used."""
    wrapped = ints.where(slot + 1 == num_slots, 0, slot + 1)
    return ints.where(is_used, wrapped, slot)


def slot_before(slot: Int, distance: int, num_slots: int) -> Int:
    """The slot that was filled so many cells earlier, less than there are slots."""
    return ints.where(slot >= distance, slot - distance, slot - distance + num_slots)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Cell arithmetic of one phase. Decode has cells of its own (decode/steps.py)."""

    config: KernelConfig
    phase: PhaseConfig

    @property
    def packing(self) -> int:
        """Tokens per packed row."""
        return self.config.cache.packing

    @property
    def block_rows(self) -> int:
        """Packed rows per block."""
        return self.phase.block_kv // self.packing

    @property
    def cell_is_window(self) -> bool:
        """Whether a cell of decode has all that its query sees, and nothing else.

        Then blocks are as long as the window. They start at the packed row of the first
        token that is seen, wherever it is in its page.
        """
        phase = self.phase
        spec = self.config.spec
        is_whole = phase.block_q == 1 and spec.attend == "all"
        return phase.is_decode and is_whole and spec.sliding_window == phase.block_kv

    @property
    def cell_rows(self) -> int:
        """Packed rows that a cell takes in VMEM.

        A block that starts within a packed row may end in one more than it has.
        """
        extra = self.config.rows_per_chunk if self.cell_is_window else 0
        return self.block_rows + extra

    @property
    def anchor_step(self) -> int:
        """Blocks start at multiples of this, so no block splits a page it skips.

        With ``batch_invariant`` all blocks start where they would from position 0 on.
        """
        if self.config.spec.batch_invariant:
            return self.phase.block_kv
        return min(self.config.cache.page_size, self.phase.block_kv)

    @property
    def block_is_one_page_part(self) -> bool:
        """Whether every block lies within one page."""
        fits = self.phase.block_kv <= self.config.cache.page_size
        return fits and not self.cell_is_window

    @property
    def blocks_divide_table(self) -> bool:
        """Whether all pages of any block are in the page table."""
        if self.config.spec.hides_first_keys:
            return False
        tokens = self.config.pages_per_sequence * self.config.cache.page_size
        return tokens % self.phase.block_kv == 0

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
        new = Range(lengths.kv_len - lengths.q_len, lengths.kv_len)
        tile = self._tile(cursor.tile, new)
        visible = self._visible(tile, new)
        covered = self._covered(tile, new, visible)
        block = self._block(cursor.block, covered)
        readable_end = self._readable_end(tile, new, visible, stored_end)
        cached = self._cached(block, visible, readable_end)
        if self.config.spec.update_kv_cache:
            new_tokens = self._new_tokens(cursor, new, block, stored_end, recent)
            owned = self._owned(tile, new, covered)
            write_back = self._write_back(block, owned, new, readable_end)
        else:
            new_tokens, write_back = NO_NEW_TOKENS, NO_WRITE_BACK
        return Cell(
            sequence=cursor.sequence,
            tile=cursor.tile,
            num_tiles=tile.num_tiles,
            block=cursor.block,
            num_blocks=block.num_blocks,
            query_token=lengths.q_start + (tile.query_position - new.begin),
            query_position=tile.query_position,
            num_queries=tile.num_queries,
            new_start=new.begin,
            block_start=block.start,
            visible_begin=visible.begin,
            visible_end=visible.end,
            cache_row_begin=self._row(block, cached.begin),
            cache_row_end=self._row(block, cached.end),
            tail_row=write_back.tail_row,
            carried_begin=new_tokens.carried_begin,
            new_begin=new_tokens.begin,
            new_end=new_tokens.end,
            write_row_begin=write_back.row_begin,
            write_row_end=write_back.row_end,
        )

    def _tile(self, index: Int, new: Range) -> Tile:
        """Cuts the new tokens at packed rows, so that no row belongs to two tiles."""
        block_q = self.phase.block_q
        origin = floor_to(new.begin, self.packing)
        num_tiles = ints.maximum(ints.ceil_div(new.end - origin, block_q), 1)
        begin = origin + index * block_q
        end = begin + block_q
        query_position = ints.maximum(new.begin, begin)
        num_queries = ints.maximum(ints.minimum(end, new.end) - query_position, 0)
        return Tile(index, num_tiles, query_position, num_queries, end)

    def _visible(self, tile: Tile, new: Range) -> Range:
        """What the queries of a tile see, from the first key of any to the last."""
        spec, begin = self.config.spec, 0
        end = new.begin if spec.attend == "cache" else self._seen_end(tile, new)
        end = ints.where(tile.num_queries > 0, ints.maximum(end, 0), 0)
        if spec.attend == "new":
            begin = ints.maximum(new.begin, 0)
        if spec.sliding_window is not None:
            first = tile.query_position - (spec.sliding_window - 1)
            begin = ints.maximum(first, begin)
        return Range(begin, end)

    def _seen_end(self, tile: Tile, new: Range) -> Int:
        """The position after the last that a tile may see of all keys."""
        spec = self.config.spec
        if not spec.causal:
            return new.end
        end = ints.minimum(tile.end, new.end)
        if spec.causal_block is not None:
            end = ints.minimum(spec.seen_end(end), new.end)
        return end

    def _owned_end(self, tile: Tile, new: Range) -> Int:
        """The position after the last that a tile, if it owns any, has to write."""
        return ints.minimum(tile.end, new.end) if self.config.spec.causal else new.end

    def _covered(self, tile: Tile, new: Range, visible: Range) -> Range:
        """What the blocks of a tile have: what it sees, and what it has to write."""
        spec = self.config.spec
        if spec.attend != "cache" or not spec.update_kv_cache:
            return visible
        end = ints.maximum(self._owned_end(tile, new), 0)
        return Range(visible.begin, ints.where(tile.num_queries > 0, end, 0))

    def _block(self, index: Int, covered: Range) -> Block:
        """Cuts a range into blocks; they need not start at its begin."""
        size = self.phase.block_kv
        anchor = floor_to(covered.begin, self.anchor_step)
        num_blocks = ints.maximum(ceil_to(covered.end - anchor, size) >> log2(size), 1)
        start = anchor + index * size
        end = ints.minimum(start + size, covered.end)
        return Block(num_blocks, start, ints.maximum(end, start))

    def _readable_end(
        self, tile: Tile, new: Range, visible: Range, stored_end: Int
    ) -> Int:
        """The position up to which a tile may read rows of the cache."""
        if not self.config.spec.update_kv_cache:
            return ceil_to(visible.end, self.packing)
        # Only the first tile reads the seam. It keeps it for the others.
        return ints.where(
            tile.index == 0,
            ceil_to(new.begin, self.packing),
            ints.maximum(floor_to(new.begin, self.packing), stored_end),
        )

    def _cached(self, block: Block, visible: Range, readable_end: Int) -> Range:
        """What is fetched from the cache: whole rows."""
        begin = ints.maximum(floor_to(visible.begin, self.packing), block.start)
        end = ints.minimum(readable_end, ceil_to(block.end, self.packing))
        return Range(begin, ints.maximum(end, begin))

    def _new_tokens(
        self,
        cursor: Cursor,
        new: Range,
        block: Block,
        stored_end: Int,
        recent: Sequence[RecentBlock],
    ) -> NewTokens:
        """What of a block is new and not known to be in the cache."""
        # The first tile meets each block once, so nothing of it is stored yet.
        known_end = ints.where(cursor.tile == 0, 0, stored_end)
        carried_begin = ints.maximum(ints.maximum(new.begin, block.start), known_end)
        begin = carried_begin
        for earlier in recent:
            is_same = earlier.is_of(cursor.sequence, block.start)
            carried_end = ints.where(is_same, earlier.new_end, 0)
            begin = ints.maximum(begin, carried_end)
        return NewTokens(carried_begin, begin, ints.maximum(block.end, begin))

    def _owned(self, tile: Tile, new: Range, covered: Range) -> Range:
        """The new tokens that it is up to a tile to write.

        A causal tile owns its own positions, also where it sees some of later tiles,
        which write those. Otherwise the first tile meets every key, so it owns them
        all.
        """
        spec = self.config.spec
        if spec.causal:
            end = covered.end
            if spec.causal_block is not None:
                end = ints.minimum(end, tile.end)
            return Range(ints.maximum(tile.query_position, 0), end)
        return Range(
            ints.maximum(new.begin, 0), ints.where(tile.index == 0, covered.end, 0)
        )

    def _write_back(
        self, block: Block, owned: Range, new: Range, readable_end: Int
    ) -> WriteBack:
        """The rows of a block that hold tokens that the tile owns."""
        begin = ints.maximum(owned.begin, block.start)
        end = ints.minimum(owned.end, block.end)
        writes = end > begin
        tail = floor_to(new.end, self.packing)
        has_tail = writes & (end == new.end) & (tail < new.end)
        tail_row = ints.where(
            has_tail & (tail >= readable_end),
            self._row(block, tail),
            NO_WRITE_BACK.tail_row,
        )
        return WriteBack(
            ints.where(writes, self._row(block, begin), 0),
            ints.where(writes, self._row(block, ceil_to(end, self.packing)), 0),
            tail_row,
        )

    def _row(self, block: Block, position: Int) -> Int:
        """The packed row of a position, counted from the start of a block."""
        return (position - block.start) >> log2(self.packing)

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
        return cell.block_start + cell.write_row_end * self.packing

    def advance(self, cell: Cell) -> Cursor:
        """The cursor of the cell after ``cell``; the sequence may be the next one."""
        block_done = cell.block + 1 >= cell.num_blocks
        tile_done = block_done & (cell.tile + 1 >= cell.num_tiles)
        return Cursor(
            sequence=ints.where(tile_done, cell.sequence + 1, cell.sequence),
            tile=ints.where(
                tile_done, 0, ints.where(block_done, cell.tile + 1, cell.tile)
            ),
            block=ints.where(block_done, 0, cell.block + 1),
        )

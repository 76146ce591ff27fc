"""Copies between HBM and VMEM, as objects with ``start`` and ``wait``.

Every ring slot has a semaphore per kind of copy. A wait names the amount, not the
copies: it asks for as many bytes as were started.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.config import KernelConfig
from jax_kernels.ragged_paged_attention.refs import (
    ZERO_ROWS,
    Bookkeeping,
    Buffers,
    HbmInputs,
    HbmOutputs,
    ScalarRefs,
    Semaphores,
)
from jax_kernels.ragged_paged_attention.schedule import Cell, Int, Schedule, log2


def _wait_for(ref, semaphore) -> None:
    """Waits for as many bytes as ``ref`` holds."""
    pltpu.make_async_copy(ref, ref, semaphore).wait()


@dataclasses.dataclass(frozen=True)
class Copies:
    """All copies of one phase.

    Attributes:
      schedule: Gives the geometry of blocks and pages.
      scalars: Lengths and page table.
      inputs: Arrays that are read.
      outputs: Arrays that are written.
      buffers: VMEM rings.
      bookkeeping: Amounts in flight.
      semaphores: One per slot and kind.
    """

    schedule: Schedule
    scalars: ScalarRefs
    inputs: HbmInputs
    outputs: HbmOutputs
    buffers: Buffers
    bookkeeping: Bookkeeping
    semaphores: Semaphores

    @property
    def config(self) -> KernelConfig:
        return self.schedule.config

    # Pages of keys and values.

    def start_block(self, cell: Cell, slot: Int) -> None:
        """Fetches the cache rows that a cell needs."""
        buffer, semaphore = self.buffers.kv.at[slot], self.semaphores.kv.at[slot]

        def fetch(page: Int, page_row: Int, block_row: Int, num_rows: Int) -> None:
            pltpu.make_async_copy(
                self._cache.at[page, :, pl.ds(page_row, num_rows)],
                buffer.at[:, pl.ds(block_row, num_rows)],
                semaphore,
            ).start()

        self._for_each_page(cell, cell.cache_row_begin, cell.cache_row_end, fetch)
        if self._has_tail:

            @pl.when(cell.tail_row >= 0)
            def _():
                self._for_each_page(
                    cell, cell.tail_row, cell.tail_row + 1, fetch, is_one_row=True
                )

    def wait_block(self, cell: Cell, slot: Int) -> None:
        num_rows = cell.cache_row_end - cell.cache_row_begin
        if self._has_tail:
            num_rows += jnp.where(cell.tail_row >= 0, 1, 0)
        self._wait_rows(slot, num_rows, self.semaphores.kv)

    def start_write_back(self, cell: Cell, slot: Int) -> None:
        """Writes the changed rows of a block to their pages."""
        buffer = self.buffers.kv.at[slot]
        semaphore = self.semaphores.write_back.at[slot]

        def write(page: Int, page_row: Int, block_row: Int, num_rows: Int) -> None:
            pltpu.make_async_copy(
                buffer.at[:, pl.ds(block_row, num_rows)],
                self._cache.at[page, :, pl.ds(page_row, num_rows)],
                semaphore,
            ).start()

        self._for_each_page(
            cell,
            cell.write_row_begin,
            cell.write_row_end,
            write,
            is_one_row=self.schedule.phase.is_decode,
        )
        num_rows = cell.write_row_end - cell.write_row_begin
        self.bookkeeping.written_rows[slot] = num_rows

    def wait_write_back(self, slot: Int) -> None:
        """Waits until a slot may be filled again."""
        num_rows = self.bookkeeping.written_rows[slot]
        self._wait_rows(slot, num_rows, self.semaphores.write_back)
        self.bookkeeping.written_rows[slot] = 0

    def _wait_rows(self, slot: Int, num_rows: Int, semaphores) -> None:
        @pl.when(num_rows > 0)
        def _():
            rows = self.buffers.kv.at[slot, :, pl.ds(0, num_rows)]
            _wait_for(rows, semaphores.at[slot])

    def _for_each_page(
        self, cell: Cell, begin: Int, end: Int, copy, *, is_one_row: bool = False
    ) -> None:
        """Calls ``copy(page, page_row, block_row, num_rows)`` for rows begin .. end.

        Args:
          cell: The cell whose block the rows belong to.
          begin: First row.
          end: Row after the last.
          copy: Starts one copy; called under a predicate.
          is_one_row: Whether there is one row at the most.
        """
        cache = self.config.cache
        table_row = cell.sequence * self.config.pages_per_sequence
        first_page = cell.block_start >> log2(cache.page_size)
        page_table = self.scalars.page_indices

        if self.schedule.block_is_one_page_part:
            first_row = cell.block_start & (cache.page_size - 1)
            first_row = first_row >> log2(cache.packing)

            @pl.when(end > begin)
            def _():
                page = page_table[table_row + first_page]
                copy(page, first_row + begin, begin, end - begin)

            return

        rows = cache.rows_per_page
        shift = log2(rows)

        def copy_part(part_begin: Int, part_end: Int) -> None:
            index = part_begin >> shift
            page = page_table[table_row + first_page + index]
            page_row = part_begin - (index << shift)
            copy(page, page_row, part_begin, part_end - part_begin)

        if is_one_row:
            pl.when(end > begin)(lambda: copy_part(begin, end))
            return

        def copy_page(index: Int, _) -> None:
            page = page_table[table_row + first_page + index]
            copy(page, 0, index << shift, rows)

        # Parts of pages, at the start (a window) and at the end, are apart from the
        # loop over whole ones, which is then as short as can be.
        first_whole = (begin + (rows - 1)) >> shift
        end_whole = end >> shift
        head_end = jnp.minimum(end, first_whole << shift)
        pl.when(begin < head_end)(lambda: copy_part(begin, head_end))
        jax.lax.fori_loop(first_whole, end_whole, copy_page, None)
        tail_begin = jnp.maximum(head_end, end_whole << shift)
        pl.when((tail_begin < end) & (begin < end))(lambda: copy_part(tail_begin, end))

    # New keys and values.

    def start_new_tokens(self, cell: Cell, slot: Int) -> None:
        num_tokens = cell.new_end - cell.new_begin

        @pl.when(num_tokens > 0)
        def _():
            first = cell.query_token + (cell.new_begin - cell.query_position)
            place = cell.new_begin - cell.block_start - self.new_tokens_origin(cell)
            for source, buffer in self._new_kv:
                heads = source.shape[1]
                pltpu.make_async_copy(
                    source.at[pl.ds(first, num_tokens)],
                    self._tokens(buffer.at[slot], place, num_tokens, heads),
                    self.semaphores.new_kv.at[slot],
                ).start()

    def wait_new_tokens(self, cell: Cell, slot: Int) -> None:
        num_tokens = cell.new_end - cell.new_begin

        @pl.when(num_tokens > 0)
        def _():
            for source, buffer in self._new_kv:
                tokens = self._tokens(buffer.at[slot], 0, num_tokens, source.shape[1])
                _wait_for(tokens, self.semaphores.new_kv.at[slot])

    def new_tokens_origin(self, cell: Cell) -> Int:
        """Block position that index 0 of the new-token buffers stands for.

        Decode has one new token, so there the buffer is one chunk of the block.
        """
        if not self.schedule.phase.is_decode:
            return 0
        chunk = self.config.tokens_per_chunk
        return (cell.new_begin - cell.block_start) & -chunk

    @property
    def _new_kv(self):
        return (
            (self.inputs.keys, self.buffers.keys),
            (self.inputs.values, self.buffers.values),
        )

    # Queries and output.

    def start_queries(self, cell: Cell, slot: Int) -> None:
        source = self.inputs.queries
        pltpu.make_async_copy(
            source.at[pl.ds(cell.query_token, cell.num_queries)],
            self._tokens(
                self.buffers.queries.at[slot], 0, cell.num_queries, source.shape[1]
            ),
            self.semaphores.queries.at[slot],
        ).start()

    def wait_queries(self, cell: Cell, slot: Int) -> None:
        heads = self.inputs.queries.shape[1]
        tokens = self._tokens(self.buffers.queries.at[slot], 0, cell.num_queries, heads)
        _wait_for(tokens, self.semaphores.queries.at[slot])

    def start_output(self, cell: Cell, slot: Int) -> None:
        target = self.outputs.out
        pltpu.make_async_copy(
            self._out_tokens(slot, cell.num_queries),
            target.at[pl.ds(cell.query_token, cell.num_queries)],
            self.semaphores.out.at[slot],
        ).start()
        self.bookkeeping.out_tokens[slot] = cell.num_queries

    def wait_output(self, slot: Int) -> None:
        num_tokens = self.bookkeeping.out_tokens[slot]

        @pl.when(num_tokens > 0)
        def _():
            tokens = self._out_tokens(slot, num_tokens)
            _wait_for(tokens, self.semaphores.out.at[slot])

        self.bookkeeping.out_tokens[slot] = 0

    def _out_tokens(self, slot: Int, num_tokens: Int):
        heads = self.outputs.out.shape[1]
        return self._tokens(self.buffers.out.at[slot], 0, num_tokens, heads)

    def _tokens(self, buffer, first: Int, num_tokens: Int, heads: int):
        """Tokens of a buffer, without the word row that is there for the banks."""
        return buffer.at[pl.ds(first, num_tokens), pl.ds(0, heads)]

    # The whole phase.

    def reset(self) -> None:
        """Nothing is in flight yet."""
        for slot in range(self.schedule.phase.num_slots):
            self.bookkeeping.written_rows[slot] = 0
        for slot in range(self.schedule.phase.num_tile_slots):
            self.bookkeeping.out_tokens[slot] = 0

    def drain(self) -> None:
        """Waits for every write of the phase."""
        if self._updates:
            for slot in range(self.schedule.phase.num_slots):
                self.wait_write_back(jnp.int32(slot))
        for slot in range(self.schedule.phase.num_tile_slots):
            self.wait_output(jnp.int32(slot))

    @property
    def _cache(self):
        # The output is the same memory as the input. Reading through the output
        # keeps reads and writes of one array in one name.
        return self.outputs.kv_cache if self._updates else self.inputs.kv_cache

    @property
    def _updates(self) -> bool:
        return self.config.spec.update_kv_cache

    @property
    def _has_tail(self) -> bool:
        return self._updates and not self.schedule.phase.is_decode


@dataclasses.dataclass(frozen=True)
class OutputClearer:
    """Zeros the rows of the output that belong to no sequence.

    Attributes:
      config: Gives shapes.
      out: The output in HBM.
      zeros: VMEM, [ZERO_ROWS, ...] of zeros.
      semaphore: One for all copies.
    """

    config: KernelConfig
    out: Any
    zeros: Any
    semaphore: Any

    def start(self, first_row: Int) -> None:
        """Clears rows first_row .. T."""
        self._for_each_piece(first_row, lambda copy: copy.start())

    def wait(self, first_row: Int) -> None:
        self._for_each_piece(first_row, lambda copy: copy.wait())

    def _for_each_piece(self, first_row: Int, action) -> None:
        num_rows = self.config.num_tokens - first_row
        whole = num_rows >> log2(ZERO_ROWS)

        def whole_piece(index: Int, _) -> None:
            action(self._copy(first_row + index * ZERO_ROWS, ZERO_ROWS))

        jax.lax.fori_loop(0, whole, whole_piece, None)
        rest = num_rows & (ZERO_ROWS - 1)

        @pl.when(rest > 0)
        def _():
            action(self._copy(first_row + whole * ZERO_ROWS, rest))

    def _copy(self, row: Int, num_rows: Int):
        source = self.zeros.at[pl.ds(0, num_rows)]
        target = self.out.at[pl.ds(row, num_rows)]
        return pltpu.make_async_copy(source, target, self.semaphore)

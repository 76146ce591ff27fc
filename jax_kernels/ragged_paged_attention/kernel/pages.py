"""Copies between the pages of a sequence in HBM and a block in VMEM."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.kernel.schedule import (
    BlockPlace,
    Int,
    Schedule,
    log2,
)


def wait_for(ref, semaphore) -> None:
    """Waits for as many bytes as ``ref`` holds."""
    pltpu.make_async_copy(ref, ref, semaphore).wait()


@dataclasses.dataclass(frozen=True)
class Pages:
    """The pages that blocks of keys and values come from and go to.

    A *block* is [heads_per_page, block rows, packing, lanes] in VMEM.

    Attributes:
      schedule: Gives the geometry of blocks and pages.
      page_indices: The page table, in SMEM.
      cache: The cache in HBM.
    """

    schedule: Schedule
    page_indices: Any
    cache: Any

    def start_fetch(
        self,
        place: BlockPlace,
        begin: Int,
        end: Int,
        block,
        semaphore,
        *,
        unrolled: bool = False,
    ) -> None:
        """Fetches rows begin .. end of a block.

        Args:
          place: Where the block starts.
          begin: First row, counted from the start of the block.
          end: Row after the last.
          block: VMEM, [heads_per_page, block rows, packing, lanes].
          semaphore: Counts the bytes.
          unrolled: Whether the code has no loops, but a place for every page.
        """

        def fetch(page: Int, page_row: Int, block_row: Int, num_rows: Int) -> None:
            pltpu.make_async_copy(
                self.cache.at[page, :, pl.ds(page_row, num_rows)],
                block.at[:, pl.ds(block_row, num_rows)],
                semaphore,
            ).start()

        if self.schedule.cell_is_window:
            self._for_each_page_from(place, end, fetch, unrolled=unrolled)
            return
        # From the first key on, blocks start at pages.
        has_head = self.schedule.config.spec.hides_first_keys
        self._for_each_page(
            place, begin, end, fetch, has_head=has_head, unrolled=unrolled
        )

    def start_fetch_row(self, place: BlockPlace, row: Int, block, semaphore) -> None:
        """Fetches one row of a block."""
        page, page_row = self._locate(place, row)
        pltpu.make_async_copy(
            self.cache.at[page, :, pl.ds(page_row, 1)],
            block.at[:, pl.ds(row, 1)],
            semaphore,
        ).start()

    def start_write(
        self, place: BlockPlace, begin: Int, end: Int, block, semaphore
    ) -> None:
        """Writes rows begin .. end of a block to their pages."""

        def write(page: Int, page_row: Int, block_row: Int, num_rows: Int) -> None:
            pltpu.make_async_copy(
                block.at[:, pl.ds(block_row, num_rows)],
                self.cache.at[page, :, pl.ds(page_row, num_rows)],
                semaphore,
            ).start()

        self._for_each_page(place, begin, end, write, has_head=True)

    def start_write_row(self, place: BlockPlace, row: Int, block, semaphore) -> None:
        """Writes one row of a block."""
        page, page_row = self._locate(place, row)
        pltpu.make_async_copy(
            block.at[:, pl.ds(row, 1)],
            self.cache.at[page, :, pl.ds(page_row, 1)],
            semaphore,
        ).start()

    def _locate(self, place: BlockPlace, row: Int) -> tuple[Int, Int]:
        """The page of a row of a block, and the row within the page."""
        if self.schedule.block_is_one_page_part:
            return self.page_indices[place.table_index], place.page_row + row
        if self.schedule.cell_is_window:
            row += place.page_row
        return self._locate_from_page(place, row)

    def _locate_from_page(self, place: BlockPlace, row: Int) -> tuple[Int, Int]:
        """``_locate`` for a row that is counted from the start of a page."""
        rows = self.schedule.config.cache.rows_per_page
        page = self.page_indices[place.table_index + (row >> log2(rows))]
        return page, row & (rows - 1)

    def _for_each_page_from(
        self, place: BlockPlace, end: Int, copy, *, unrolled: bool
    ) -> None:
        """``_for_each_page`` for rows 0 .. end of a block that starts within a page."""
        first = place.page_row
        rows = self.schedule.config.cache.rows_per_page
        if rows < self.schedule.block_rows:

            def copy_shifted(page: Int, page_row: Int, row: Int, num_rows: Int) -> None:
                copy(page, page_row, row - first, num_rows)

            self._for_each_page(
                place,
                first,
                first + end,
                copy_shifted,
                has_head=True,
                unrolled=unrolled,
            )
            return
        # The block is in one page or in two.
        num_first = jnp.minimum(end, rows - first)

        @pl.when(end > 0)
        def _():
            copy(self.page_indices[place.table_index], first, 0, num_first)

        @pl.when(end > num_first)
        def _():
            page = self.page_indices[place.table_index + 1]
            copy(page, 0, num_first, end - num_first)

    def _for_each_page(
        self,
        place: BlockPlace,
        begin: Int,
        end: Int,
        copy,
        *,
        has_head: bool,
        unrolled: bool = False,
    ) -> None:
        """Calls ``copy(page, page_row, block_row, num_rows)`` for rows begin .. end.

        Args:
          place: Where the block starts. If blocks start within pages, rows are counted
            from the start of its first page.
          begin: First row.
          end: Row after the last.
          copy: Starts one copy; called under a predicate or in a loop.
          has_head: Whether ``begin`` may be in the middle of a page.
          unrolled: See ``start_fetch``.
        """

        is_one_page_part = self.schedule.block_is_one_page_part
        locate = self._locate if is_one_page_part else self._locate_from_page

        def copy_part(part_begin: Int, part_end: Int) -> None:
            page, page_row = locate(place, part_begin)
            copy(page, page_row, part_begin, part_end - part_begin)

        if is_one_page_part:
            pl.when(end > begin)(lambda: copy_part(begin, end))
            return

        rows = self.schedule.config.cache.rows_per_page
        shift = log2(rows)

        def copy_page(index: Int, page: Int | None = None) -> None:
            if page is None:
                page = self.page_indices[place.table_index + index]
            copy(page, 0, index << shift, rows)

        # Parts of pages, at the start (a window) and at the end, are apart from the
        # loop over whole ones, which is then as short as can be.
        first_whole, end_whole = (begin + (rows - 1)) >> shift, end >> shift
        head_end = begin
        if has_head:
            head_end = jnp.minimum(end, first_whole << shift)
            pl.when(begin < head_end)(lambda: copy_part(begin, head_end))
        if unrolled:
            # A block that starts within a page may end in one more than it has.
            num_pages = self.schedule.block_rows >> shift
            num_pages += self.schedule.cell_is_window
            pages = self.page_indices.at[pl.ds(place.table_index, num_pages)]
            for index in range(num_pages):
                is_whole = index < end_whole
                if has_head:
                    is_whole &= index >= first_whole
                # A load is cheaper without the condition.
                page = pages[index] if self.schedule.blocks_divide_table else None
                pl.when(is_whole)(functools.partial(copy_page, index, page))
        else:
            for_each(first_whole, end_whole, copy_page)
        if has_head:
            tail_begin = jnp.maximum(head_end, end_whole << shift)
            has_tail = (tail_begin < end) & (begin < end)
            pl.when(has_tail)(lambda: copy_part(tail_begin, end))
            return
        num_rows = end & (rows - 1)

        @pl.when(num_rows > 0)
        def _():
            page = self.page_indices[place.table_index + end_whole]
            copy(page, 0, end_whole << shift, num_rows)


def for_each(begin: Int, end: Int, action, unroll: int = 4) -> None:
    """Calls ``action`` for begin .. end: the scalar work of several overlaps."""
    num_groups = jnp.maximum(end - begin, 0) >> log2(unroll)

    def group(index: Int, _) -> None:
        for offset in range(unroll):
            action(begin + index * unroll + offset)

    lax.fori_loop(0, num_groups, group, None)
    lax.fori_loop(begin + num_groups * unroll, end, lambda i, _: action(i), None)

"""Copies between HBM and VMEM, as objects with ``start`` and ``wait``.

Every ring slot has a semaphore per kind of copy. A wait names the amount, not the
copies: it asks for as many bytes as were started.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.config import KernelConfig
from jax_kernels.ragged_paged_attention.kernel.decode.steps import Step
from jax_kernels.ragged_paged_attention.kernel.pages import Pages, wait_for
from jax_kernels.ragged_paged_attention.kernel.refs import (
    ONLY_SLOT,
    ZERO_ROWS,
    Bookkeeping,
    Buffers,
    HbmInputs,
    HbmOutputs,
    ScalarRefs,
    Semaphores,
)
from jax_kernels.ragged_paged_attention.kernel.schedule import (
    Cell,
    Int,
    Schedule,
    floor_to,
    log2,
)


@dataclasses.dataclass(frozen=True)
class PhaseCopies:
    """What the copies of a phase work on.

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

    @property
    def updates(self) -> bool:
        return self.config.spec.update_kv_cache

    @property
    def carries(self) -> bool:
        """Whether packed tokens are copied from slot to slot.

        To pack them again is as cheap where the chip has an instruction for it.
        """
        return self.updates and self.config.rounds_in_software

    @property
    def pages(self) -> Pages:
        # The output is the same memory as the input. Reading through the output
        # keeps reads and writes of one array in one name.
        cache = self.outputs.kv_cache if self.updates else self.inputs.kv_cache
        return Pages(self.schedule, self.scalars.page_indices, cache)

    @property
    def new_kv(self):
        """Pairs of an array of new tokens in HBM and its ring in VMEM."""
        return (
            (self.inputs.keys, self.buffers.keys),
            (self.inputs.values, self.buffers.values),
        )

    def wait_rows(self, slot: Int, num_rows: Int, semaphores) -> None:
        """Waits for cache rows that move into or out of a slot of ``buffers.kv``."""

        @pl.when(num_rows > 0)
        def _():
            rows = self.buffers.kv.at[slot, :, pl.ds(0, num_rows)]
            wait_for(rows, semaphores.at[slot])

    def reset(self) -> None:
        """Nothing is in flight yet."""
        for slot in range(self.schedule.phase.num_slots):
            self.bookkeeping.written_rows[slot] = 0
        for slot in range(self.schedule.phase.num_tile_slots):
            self.bookkeeping.out_tokens[slot] = 0

    def wait_write_back(self, slot: Int) -> None:
        """Waits until what is written back from a slot has landed."""
        num_rows = self.bookkeeping.written_rows[slot]
        self.wait_rows(slot, num_rows, self.semaphores.write_back)
        self.bookkeeping.written_rows[slot] = 0

    def wait_output(self, slot: Int) -> None:
        """Waits until an output buffer may be filled again."""
        num_tokens = self.bookkeeping.out_tokens[slot]

        @pl.when(num_tokens > 0)
        def _():
            wait_for(self.out_tokens(slot, num_tokens), self.semaphores.out.at[slot])

        self.bookkeeping.out_tokens[slot] = 0

    def drain(self) -> None:
        """Waits for every write of the phase."""
        if self.updates:
            for slot in range(self.schedule.phase.num_slots):
                self.wait_write_back(jnp.int32(slot))
        for slot in range(self.schedule.phase.num_tile_slots):
            self.wait_output(jnp.int32(slot))

    def start_output(self, slot: Int, first_token: Int, num_tokens: Int) -> None:
        """Sends the first tokens of an output buffer to HBM."""
        pltpu.make_async_copy(
            self.out_tokens(slot, num_tokens),
            self.outputs.out.at[pl.ds(first_token, num_tokens)],
            self.semaphores.out.at[slot],
        ).start()
        self.bookkeeping.out_tokens[slot] = num_tokens

    def out_tokens(self, slot: Int, num_tokens: Int):
        heads = self.outputs.out.shape[1]
        return some_tokens(self.buffers.out.at[slot], 0, num_tokens, heads)


def some_tokens(buffer, first: Int, num_tokens: Int, heads: int):
    """Tokens of a buffer, without the word rows that are there for the banks."""
    return buffer.at[pl.ds(first, num_tokens), pl.ds(0, heads)]


class NewTokensPiece(NamedTuple):
    """New tokens that are in the buffers at once, as positions."""

    origin: Int  # of the start of the buffers, a multiple of a chunk into the block
    begin: Int
    end: Int


class Copies(PhaseCopies):
    """The copies of a phase of tiles, prefill or mixed; a slot holds one cell."""

    # Pages of keys and values.

    def start_block(self, cell: Cell, slot: Int) -> None:
        """Fetches the cache rows that a cell needs."""
        block, semaphore = self.buffers.kv.at[slot], self.semaphores.kv.at[slot]
        place = self.schedule.block_place(cell)
        self.pages.start_fetch(
            place, cell.cache_row_begin, cell.cache_row_end, block, semaphore
        )
        if self.updates:

            @pl.when(cell.tail_row >= 0)
            def _():
                self.pages.start_fetch_row(place, cell.tail_row, block, semaphore)

    def wait_block(self, cell: Cell, slot: Int) -> None:
        num_rows = cell.cache_row_end - cell.cache_row_begin
        if self.updates:
            num_rows += jnp.where(cell.tail_row >= 0, 1, 0)
        self.wait_rows(slot, num_rows, self.semaphores.kv)

    def start_write_back(self, cell: Cell, slot: Int) -> None:
        """Writes the changed rows of a block to their pages."""
        self.pages.start_write(
            self.schedule.block_place(cell),
            cell.write_row_begin,
            cell.write_row_end,
            self.buffers.kv.at[slot],
            self.semaphores.write_back.at[slot],
        )
        num_rows = cell.write_row_end - cell.write_row_begin
        self.bookkeeping.written_rows[slot] = num_rows

    # New keys and values.

    def new_tokens_piece(self, cell: Cell, piece: Int) -> NewTokensPiece:
        """Some of the new tokens of a cell: as many as the buffers hold."""
        size = self.buffers.keys.shape[1]
        first = floor_to(
            cell.new_begin - cell.block_start, self.config.tokens_per_chunk
        )
        origin = cell.block_start + first + piece * size
        return NewTokensPiece(
            origin,
            begin=jnp.maximum(cell.new_begin, origin),
            end=jnp.minimum(cell.new_end, origin + size),
        )

    def start_new_tokens(self, cell: Cell, piece: Int = 0) -> None:
        """Fetches a piece of the new tokens of a cell, if there is one."""
        origin, begin, end = self.new_tokens_piece(cell, piece)

        @pl.when(end > begin)
        def _():
            first = cell.query_token + (begin - cell.query_position)
            for source, buffer in self.new_kv:
                heads = source.shape[1]
                pltpu.make_async_copy(
                    source.at[pl.ds(first, end - begin)],
                    some_tokens(
                        buffer.at[ONLY_SLOT], begin - origin, end - begin, heads
                    ),
                    self.semaphores.new_kv.at[ONLY_SLOT],
                ).start()

    def wait_new_tokens(self, piece: NewTokensPiece) -> None:
        for source, buffer in self.new_kv:
            heads = source.shape[1]
            tokens = some_tokens(
                buffer.at[ONLY_SLOT], 0, piece.end - piece.begin, heads
            )
            wait_for(tokens, self.semaphores.new_kv.at[ONLY_SLOT])

    # Queries and output.

    def start_queries(self, cell: Cell) -> None:
        source = self.inputs.queries
        pltpu.make_async_copy(
            source.at[pl.ds(cell.query_token, cell.num_queries)],
            some_tokens(
                self.buffers.queries.at[ONLY_SLOT], 0, cell.num_queries, source.shape[1]
            ),
            self.semaphores.queries.at[ONLY_SLOT],
        ).start()

    def wait_queries(self, cell: Cell) -> None:
        heads = self.inputs.queries.shape[1]
        tokens = some_tokens(
            self.buffers.queries.at[ONLY_SLOT], 0, cell.num_queries, heads
        )
        wait_for(tokens, self.semaphores.queries.at[ONLY_SLOT])


class StepCopies(PhaseCopies):
    """The copies of decode; a slot holds the cells of one step side by side."""

    def block(self, slot: Int, index: int):
        """The block of the cell ``index`` of a step."""
        rows = self.schedule.block_rows
        return self.buffers.kv.at[slot, :, pl.ds(index * rows, rows)]

    def start(self, step: Step, slot: Int) -> None:
        """Fetches all that a step needs.

        Its sequences follow each other in the flat arrays, so their queries, new keys
        and new values are one range each.
        """

        @pl.when(step.num_tokens > 0)
        def _():
            for source, buffer, semaphores in self._token_rings:
                pltpu.make_async_copy(
                    source.at[pl.ds(step.first_token, step.num_tokens)],
                    some_tokens(buffer.at[slot], 0, step.num_tokens, source.shape[1]),
                    semaphores.at[slot],
                ).start()

        for index, cell in enumerate(step.cells):
            self.pages.start_fetch(
                cell.place,
                cell.row_begin,
                cell.row_end,
                self.block(slot, index),
                self.semaphores.kv.at[slot],
            )

    def wait(self, step: Step, slot: Int) -> None:
        """Waits for all that ``start`` fetches."""

        @pl.when(step.num_tokens > 0)
        def _():
            for source, buffer, semaphores in self._token_rings:
                heads = source.shape[1]
                tokens = some_tokens(buffer.at[slot], 0, step.num_tokens, heads)
                wait_for(tokens, semaphores.at[slot])

        self.wait_rows(slot, step.num_rows, self.semaphores.kv)

    @property
    def _token_rings(self):
        queries = (self.inputs.queries, self.buffers.queries, self.semaphores.queries)
        if not self.updates:
            return [queries]
        return [queries, *((*pair, self.semaphores.new_kv) for pair in self.new_kv)]

    def start_write_back(self, step: Step, slot: Int) -> None:
        """Writes the rows that hold new tokens to their pages."""
        for index, cell in enumerate(step.cells):

            @pl.when(cell.new_place >= 0)
            def _(index=index, cell=cell):
                self.pages.start_write_row(
                    cell.place,
                    cell.new_place >> log2(self.config.cache.packing),
                    self.block(slot, index),
                    self.semaphores.write_back.at[slot],
                )

        self.bookkeeping.written_rows[slot] = step.num_written

    def start_outputs(self, step: Step, slot: Int) -> None:
        """Sends the outputs of the sequences that end in a step."""

        @pl.when(step.num_ended > 0)
        def _():
            self.start_output(slot, step.first_token, step.num_ended)


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
        num_rows = self.config.num_tokens - first_row
        num_whole = num_rows >> log2(ZERO_ROWS)

        def clear(row: Int, size: Int) -> None:
            pltpu.make_async_copy(
                self.zeros.at[pl.ds(0, size)],
                self.out.at[pl.ds(row, size)],
                self.semaphore,
            ).start()

        def whole_piece(index: Int, _) -> None:
            clear(first_row + index * ZERO_ROWS, ZERO_ROWS)

        jax.lax.fori_loop(0, num_whole, whole_piece, None)
        rest = num_rows & (ZERO_ROWS - 1)

        @pl.when(rest > 0)
        def _():
            clear(first_row + num_whole * ZERO_ROWS, rest)

    def wait(self, first_row: Int) -> None:
        num_rows = self.config.num_tokens - first_row

        @pl.when(num_rows > 0)
        def _():
            wait_for(self.out.at[pl.ds(first_row, num_rows)], self.semaphore)

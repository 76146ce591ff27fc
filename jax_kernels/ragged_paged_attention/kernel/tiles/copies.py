"""Copies of prefill and mixed."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.kernel.copies import (
    PhaseCopies,
    new_tokens,
    pages_of,
    some_tokens,
)
from jax_kernels.ragged_paged_attention.kernel.pages import wait_for
from jax_kernels.ragged_paged_attention.kernel.schedule import Cell, Int, floor_to
from jax_kernels.ragged_paged_attention.kernel.tiles.buffers import (
    ONLY_SLOT,
    Buffers,
    TileContext,
    new_token_capacity,
)


class TileCopies(PhaseCopies[Buffers]):
    """Starts the copies of cells and waits for them."""

    # Pages of keys and values.

    def start_block(self, cell: Cell, slot: Int) -> None:
        """Fetches the packed rows that a cell needs."""
        context, pages = self.context, pages_of(self.context)
        block = context.rings.kv.at[slot]
        semaphore = context.semaphores.kv.at[slot]
        place = context.schedule.block_place(cell)
        pages.start_fetch(
            place, cell.cache_row_begin, cell.cache_row_end, block, semaphore
        )
        if context.updates:

            @pl.when(cell.tail_row >= 0)
            def _():
                pages.start_fetch_row(place, cell.tail_row, block, semaphore)

    def wait_block(self, cell: Cell, slot: Int) -> None:
        num_rows = cell.cache_row_end - cell.cache_row_begin
        if self.context.updates:
            num_rows += jnp.where(cell.tail_row >= 0, 1, 0)
        self.wait_rows(slot, num_rows, self.context.semaphores.kv)

    def start_write_back(self, cell: Cell, slot: Int) -> None:
        """Writes the changed rows of a block to their pages."""
        context = self.context
        pages_of(context).start_write(
            context.schedule.block_place(cell),
            cell.write_row_begin,
            cell.write_row_end,
            context.rings.kv.at[slot],
            context.semaphores.write_back.at[slot],
        )
        num_rows = cell.write_row_end - cell.write_row_begin
        context.bookkeeping.written_rows[slot] = num_rows

    # New keys and values.

    def start_new_tokens(self, cell: Cell, index: Int = 0) -> None:
        """Fetches a piece of the new tokens of a cell, if there is one."""
        context = self.context
        piece = new_tokens_piece(context, cell, index)

        @pl.when(piece.end > piece.begin)
        def _():
            for name, pairs in _new_tokens(context, cell, piece).items():
                for source, target in pairs:
                    semaphore = self._semaphore_of_new(name)
                    pltpu.make_async_copy(source, target, semaphore).start()

    def wait_new_tokens(self, cell: Cell, piece: "NewTokensPiece", name: str) -> None:
        """Waits for the ``"keys"`` or the ``"values"`` of a piece."""
        for _, target in _new_tokens(self.context, cell, piece)[name]:
            wait_for(target, self._semaphore_of_new(name))

    def _semaphore_of_new(self, name: str):
        """Keys and values have slots of their own, since they come one by one."""
        slot = ONLY_SLOT if name == "keys" else ONLY_SLOT + 1
        return self.context.semaphores.new_kv.at[slot]

    # Queries.

    def start_queries(self, cell: Cell) -> None:
        source = self.context.inputs.queries
        pltpu.make_async_copy(
            source.at[pl.ds(cell.query_token, cell.num_queries)],
            _query_tokens(self.context, cell),
            self.context.semaphores.queries.at[ONLY_SLOT],
        ).start()

    def wait_queries(self, cell: Cell) -> None:
        tokens = _query_tokens(self.context, cell)
        wait_for(tokens, self.context.semaphores.queries.at[ONLY_SLOT])


class NewTokensPiece(NamedTuple):
    """New tokens that are in the buffers at once, as positions."""

    origin: Int  # of the start of the buffers, a multiple of a chunk into the block
    begin: Int
    end: Int


def new_tokens_piece(context: TileContext, cell: Cell, index: Int) -> NewTokensPiece:
    """Some of the new tokens of a cell: as many as the buffers hold."""
    size = new_token_capacity(context.config, context.phase)
    first = floor_to(cell.new_begin - cell.block_start, context.config.tokens_per_chunk)
    origin = cell.block_start + first + index * size
    return NewTokensPiece(
        origin,
        begin=jnp.maximum(cell.new_begin, origin),
        end=jnp.minimum(cell.new_end, origin + size),
    )


def flat_token(cell: Cell, position: Int) -> Int:
    """The number in the flat arrays of a position; that of no token before the new."""
    return cell.query_token + (position - cell.query_position)


def _new_tokens(context: TileContext, cell: Cell, piece: NewTokensPiece) -> dict:
    """Where a piece of the new tokens of a cell comes from and goes to, by name."""
    pairs = new_tokens(
        context,
        ONLY_SLOT,
        flat_token(cell, piece.origin),
        flat_token(cell, piece.begin),
        piece.end - piece.begin,
    )
    middle = len(pairs) // 2
    return {"keys": pairs[:middle], "values": pairs[middle:]}


def _query_tokens(context: TileContext, cell: Cell):
    """Where the queries of a tile are fetched to."""
    word_rows = context.inputs.queries.shape[1]
    ring = context.rings.queries
    return some_tokens(ring.at[ONLY_SLOT], 0, cell.num_queries, word_rows)

"""Puts new keys and values into their place in a block, as packed cache rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_kernels.ragged_paged_attention.config import KernelConfig
from jax_kernels.ragged_paged_attention.kernel import masking, tile_io
from jax_kernels.ragged_paged_attention.kernel.decode.steps import DecodeCell
from jax_kernels.ragged_paged_attention.kernel.phase import (
    Copies,
    NewTokensPiece,
    StepCopies,
)
from jax_kernels.ragged_paged_attention.kernel.refs import ONLY_SLOT
from jax_kernels.ragged_paged_attention.kernel.schedule import Cell, Int, log2
from jax_kernels.ragged_paged_attention.layout import dtype_packing


def merge(copies: Copies, cell: Cell, slot: Int) -> None:
    """Waits for the new tokens of a cell, of which there are some, and merges them.

    The first piece was fetched with the cell. The others, which are rare, are fetched
    here, one after the other.
    """

    def piece(index: Int) -> Int:
        part = copies.new_tokens_piece(cell, index)
        copies.wait_new_tokens(part)
        _merge_piece(copies, cell, slot, part)
        copies.start_new_tokens(cell, index + 1)
        return index + 1

    def is_left(index: Int) -> jax.Array:
        return copies.new_tokens_piece(cell, index).origin < cell.new_end

    lax.while_loop(is_left, piece, jnp.int32(0))


def _merge_piece(copies: Copies, cell: Cell, slot: Int, part: NewTokensPiece) -> None:
    """Merges new tokens, one chunk of the block after the other."""
    config, buffers = copies.config, copies.buffers
    chunk_tokens = config.tokens_per_chunk
    first_chunk = (part.origin - cell.block_start) >> log2(chunk_tokens)
    stride = buffers.keys.shape[-3]
    sources = [
        tile_io.WordRows(ref.at[ONLY_SLOT], config.interpret)
        for ref in (buffers.keys, buffers.values)
    ]

    def chunk(index: Int, is_new: jax.Array | None) -> None:
        for pair in range(config.num_kv_heads // dtype_packing(config.io_dtype)):
            start = (index - first_chunk) * (chunk_tokens * stride) + pair
            words = [source.load(start, chunk_tokens, stride) for source in sources]
            _merge_pair(buffers.kv.at[slot], index, pair, words, is_new, config)

    _for_each_chunk(cell.block_start, part.begin, part.end, chunk, config)


def carry(copies: Copies, cell: Cell, slot: Int, source: Int) -> None:
    """Copies the tokens that an earlier cell has merged into the same block.

    Packing them again would cost more, above all where the chip has no instruction
    for the dtype of the cache.

    Args:
      copies: Gives buffers and geometry.
      cell: The cell.
      slot: Its slot.
      source: Slot of the earlier cell.
    """
    config, kv = copies.config, copies.buffers.kv

    def rows_of(a_slot: Int, head: int) -> tile_io.WordRows:
        return tile_io.WordRows(kv.at[a_slot, head], config.interpret)

    def chunk(index: Int, is_carried: jax.Array | None) -> None:
        first_row = index * config.rows_per_chunk
        heads = range(config.cache.heads_per_page)
        # All loads before the first store: the slots might be the same for all that
        # the compiler knows, and each load would wait for the store before it.
        words = [
            rows_of(source, h).load(first_row, config.rows_per_chunk) for h in heads
        ]
        for head in heads:
            _store_bits(rows_of(slot, head), first_row, words[head], is_carried, config)

    _for_each_chunk(cell.block_start, cell.carried_begin, cell.new_begin, chunk, config)


def _for_each_chunk(
    block_start: Int,
    begin: Int,
    end: Int,
    do: Callable[[Int, jax.Array | None], None],
    config: KernelConfig,
) -> None:
    """Calls ``do`` with each chunk of a block that holds positions begin .. end.

    Args:
      block_start: Position of the first slot of the block.
      begin: First position.
      end: Position after the last.
      do: Takes the number of a chunk, and the bits of the positions within it,
        u32[rows, 1], or None for all. Only the chunks at the two ends may hold other
        positions as well; they may be the same chunk, which then comes twice.
      config: Gives the size of a chunk.
    """
    shift = log2(config.tokens_per_chunk)
    begin_place, end_place = begin - block_start, end - block_start
    for edge in (begin_place, end_place):

        @pl.when((edge & (config.tokens_per_chunk - 1)) != 0)
        def _(index=edge >> shift):
            bits = masking.live_word_mask(
                block_start + index * config.tokens_per_chunk,
                config.rows_per_chunk,
                config.cache.packing,
                begin,
                end,
            )
            do(index, bits)

    first_whole = (begin_place + config.tokens_per_chunk - 1) >> shift
    lax.fori_loop(
        first_whole, end_place >> shift, lambda index, _: do(index, None), None
    )


def merge_one(
    copies: StepCopies, cell: DecodeCell, slot: Int, index: int, pair: Int
) -> None:
    """Merges the new token of a decode cell, if the cell has it.

    Args:
      copies: Gives buffers and geometry.
      cell: The cell.
      slot: Slot of its step.
      index: Number of the cell within the step.
      pair: Word row of ``keys`` and ``values`` to merge: heads by their packing.
    """
    config, buffers = copies.config, copies.buffers
    num_chunks = copies.schedule.block_rows // config.rows_per_chunk
    place = jnp.maximum(cell.new_place, 0)
    chunk = place >> log2(config.tokens_per_chunk)
    is_new = masking.live_word_mask(
        chunk * config.tokens_per_chunk,
        config.rows_per_chunk,
        config.cache.packing,
        place,
        cell.new_place + 1,
    )
    words = []
    for ref in (buffers.keys, buffers.values):
        rows = tile_io.WordRows(ref.at[slot, cell.query], config.interpret)
        token = rows.load(pair, 1)
        # The mask picks one place of the chunk, so the token is laid in all.
        shape = config.tokens_per_chunk, token.shape[1]
        words.append(jnp.broadcast_to(token, shape))
    chunk_of_step = index * num_chunks + chunk
    _merge_pair(buffers.kv.at[slot], chunk_of_step, pair, words, is_new, config)


def _merge_pair(kv, chunk: Int, pair: Int, words, is_new, config: KernelConfig) -> None:
    """Merges one chunk of the heads that share a word row of the new tokens.

    Slots that hold no new token keep what they have.

    Args:
      kv: VMEM, [heads_per_page, rows, packing, lanes].
      chunk: Number of the chunk: eight packed rows, a register per head.
      pair: Number of the word row.
      words: Keys and values, u32[tokens_per_chunk, io_lanes] each.
      is_new: u32[rows_per_chunk, 1], the bits to take; None for all.
      config: Gives dtypes and geometry.
    """
    packing = dtype_packing(config.io_dtype)
    first_row = chunk * config.rows_per_chunk
    heads = [tile_io.unpack_heads(source, packing) for source in words]
    for offset, (key, value) in enumerate(zip(*heads, strict=True)):
        head = pair * packing + offset
        for part, new in enumerate(tile_io.pack_tokens(key, value, config)):
            rows = tile_io.WordRows(
                kv.at[part * config.num_kv_heads + head], config.interpret
            )
            _store_bits(rows, first_row, new, is_new, config)


def _store_bits(
    rows: tile_io.WordRows,
    first_row: Int,
    new: jax.Array,
    mask: jax.Array | None,
    config: KernelConfig,
) -> None:
    """Stores a chunk of one head; with a mask, only those bits of it."""
    if mask is not None:
        old = rows.load(first_row, config.rows_per_chunk)
        new = (new & mask) | (old & ~mask)
    rows.store(new, first_row)

"""Puts new keys and values into their place in a block, as packed cache rows."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_kernels.ragged_paged_attention import masking, tile_io
from jax_kernels.ragged_paged_attention.config import KernelConfig
from jax_kernels.ragged_paged_attention.decode_steps import DecodeCell
from jax_kernels.ragged_paged_attention.dma import (
    Copies,
    NewTokensPiece,
    StepCopies,
)
from jax_kernels.ragged_paged_attention.layout import dtype_packing
from jax_kernels.ragged_paged_attention.refs import ONLY_SLOT
from jax_kernels.ragged_paged_attention.schedule import Cell, Int, log2


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
    """Merges new tokens, one chunk of the block after the other.

    Only the chunks at the two ends may hold older tokens as well.
    """
    config, buffers = copies.config, copies.buffers
    origin, begin, end = (position - cell.block_start for position in part)
    chunk_tokens = config.tokens_per_chunk
    shift = log2(chunk_tokens)
    first_chunk = origin >> shift
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

    for edge in (begin, end):

        @pl.when((edge & (chunk_tokens - 1)) != 0)
        def _(index=edge >> shift):
            chunk(index, _new_bits(cell, index, config))

    first_whole = (begin + chunk_tokens - 1) >> shift
    lax.fori_loop(first_whole, end >> shift, lambda index, _: chunk(index, None), None)


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
            if is_new is not None:
                old = rows.load(first_row, config.rows_per_chunk)
                new = _select_bits(is_new, new, old)
            rows.store(new, first_row)


def _new_bits(cell: Cell, chunk: Int, config: KernelConfig) -> jax.Array:
    """The bits of new tokens in a chunk of the cell's block, u32[rows, 1]."""
    return masking.live_word_mask(
        cell.block_start + chunk * config.tokens_per_chunk,
        config.rows_per_chunk,
        config.cache.packing,
        cell.new_begin,
        cell.new_end,
    )


def _select_bits(mask: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return (new & mask) | (old & ~mask)

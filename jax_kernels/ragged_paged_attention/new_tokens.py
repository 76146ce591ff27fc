"""Puts new keys and values into their place in a block, as packed cache rows."""

import jax
from jax import lax

from jax_kernels.ragged_paged_attention import masking, tile_io
from jax_kernels.ragged_paged_attention.dma import Copies
from jax_kernels.ragged_paged_attention.layout import dtype_packing
from jax_kernels.ragged_paged_attention.schedule import Cell, Int, log2


def merge(copies: Copies, cell: Cell, slot: Int) -> None:
    """Merges all new tokens of a cell, one chunk of the block after the other."""
    begin = cell.new_begin - cell.block_start
    end = cell.new_end - cell.block_start
    chunk_tokens = copies.config.tokens_per_chunk
    shift = log2(chunk_tokens)

    def chunk(index: Int, _) -> None:
        merge_chunk(copies, cell, slot, index, range(_num_pairs(copies)))

    lax.fori_loop(begin >> shift, (end + chunk_tokens - 1) >> shift, chunk, None)


def merge_chunk(copies: Copies, cell: Cell, slot: Int, chunk: Int, pairs) -> None:
    """Merges one chunk: eight packed rows of the block, a register per head.

    Slots that hold no new token keep what they have.

    Args:
      copies: Gives buffers and geometry.
      cell: The cell.
      slot: Its slot.
      chunk: Number of the chunk within the block.
      pairs: Word rows of ``keys`` and ``values`` to merge: heads by their packing.
    """
    config, buffers = copies.config, copies.buffers
    packing = dtype_packing(config.io_dtype)
    chunk_rows, chunk_tokens = config.rows_per_chunk, config.tokens_per_chunk
    stride = buffers.keys.shape[-3]
    keys = tile_io.WordRows(buffers.keys.at[slot], config.interpret)
    values = tile_io.WordRows(buffers.values.at[slot], config.interpret)
    first_row, first_token = chunk * chunk_rows, chunk * chunk_tokens
    is_new = masking.live_word_mask(
        cell.block_start + first_token,
        chunk_rows,
        config.cache.packing,
        cell.new_begin,
        cell.new_end,
    )
    origin = copies.new_tokens_origin(cell)
    for pair in pairs:
        start = (first_token - origin) * stride + pair
        heads = [
            tile_io.unpack_heads(source.load(start, chunk_tokens, stride), packing)
            for source in (keys, values)
        ]
        for offset, (key, value) in enumerate(zip(*heads, strict=True)):
            head = pair * packing + offset
            for part, new in enumerate(tile_io.pack_tokens(key, value, config)):
                rows = tile_io.WordRows(
                    buffers.kv.at[slot, part * config.num_kv_heads + head],
                    config.interpret,
                )
                rows.store(
                    _select_bits(is_new, new, rows.load(first_row, chunk_rows)),
                    first_row,
                )


def _select_bits(mask: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return (new & mask) | (old & ~mask)


def _num_pairs(copies: Copies) -> int:
    return copies.config.num_kv_heads // dtype_packing(copies.config.io_dtype)

"""Puts new keys and values into their place in a block, as packed cache rows."""

from collections.abc import Sequence

import jax

from jax_kernels.ragged_paged_attention.config import KernelConfig
from jax_kernels.ragged_paged_attention.kernel import tile_io
from jax_kernels.ragged_paged_attention.kernel.schedule import Int
from jax_kernels.ragged_paged_attention.layout import dtype_packing


def merge_pair(
    kv,
    chunk: Int,
    pair: Int,
    words: Sequence[jax.Array],
    is_new: jax.Array | None,
    config: KernelConfig,
) -> None:
    """Merges one chunk of the heads that share a word row of the new tokens.

    Positions without a new token keep what they have.

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
            store_bits(rows, first_row, new, is_new, config)


def store_bits(
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

"""Merges the new token of a decode cell into its block."""

import jax.numpy as jnp

from jax_kernels.ragged_paged_attention.kernel import masking, tile_io
from jax_kernels.ragged_paged_attention.kernel.decode.buffers import DecodeContext
from jax_kernels.ragged_paged_attention.kernel.decode.steps import DecodeCell
from jax_kernels.ragged_paged_attention.kernel.new_tokens import merge_pair
from jax_kernels.ragged_paged_attention.kernel.schedule import Int, log2


def merge(
    context: DecodeContext, cell: DecodeCell, slot: Int, index: int, pair: Int
) -> None:
    """Merges the new token of a decode cell, if the cell has it.

    Args:
      context: Gives buffers and geometry.
      cell: The cell.
      slot: Slot of its step.
      index: Number of the cell within the step.
      pair: Word row of ``keys`` and ``values`` to merge: heads by their packing.
    """
    config, rings = context.config, context.rings
    num_chunks = context.schedule.block_rows // config.rows_per_chunk
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
    for ref in (rings.keys, rings.values):
        rows = tile_io.WordRows(ref.at[slot, cell.query], config.interpret)
        token = rows.load(pair, 1)
        # The mask picks one place of the chunk, so the token is laid in all.
        shape = config.tokens_per_chunk, token.shape[1]
        words.append(jnp.broadcast_to(token, shape))
    chunk_of_step = index * num_chunks + chunk
    merge_pair(rings.kv.at[slot], chunk_of_step, pair, words, is_new, config)

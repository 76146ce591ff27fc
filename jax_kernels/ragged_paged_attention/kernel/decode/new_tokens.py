"""Merges the new tokens of a decode cell into its block."""

import jax.numpy as jnp

from jax_kernels.ragged_paged_attention.kernel import masking
from jax_kernels.ragged_paged_attention.kernel.decode.buffers import (
    DecodeContext,
    new_tokens_margin,
)
from jax_kernels.ragged_paged_attention.kernel.decode.steps import (
    DecodeCell,
    new_end,
    tokens_per_step,
)
from jax_kernels.ragged_paged_attention.kernel.new_tokens import (
    load_token,
    load_tokens,
    merge_group,
)
from jax_kernels.ragged_paged_attention.kernel.schedule import Int, log2


def merge(
    context: DecodeContext,
    cell: DecodeCell,
    slot: Int,
    first_token: Int,
    index: int,
    group: Int,
) -> None:
    """Merges the new tokens of a decode cell, if the cell has any.

    Args:
      context: Gives buffers and geometry.
      cell: The cell.
      slot: Slot of its step.
      first_token: First token of the step, in the flat arrays.
      index: Number of the cell within the step.
      group: Word row of ``keys`` and ``values`` to merge: heads by their packing.
    """
    if context.phase.block_q > 1:
        _merge_several(context, cell, slot, first_token, index, group)
        return
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
    # The mask picks one place of the chunk, so the token is laid in all.
    keys, values = (
        load_token(
            ring.at[slot],
            first_token,
            cell.query,
            config.tokens_per_chunk,
            group,
            config,
        )
        for ring in (rings.keys, rings.values)
    )
    chunk_of_step = index * num_chunks + chunk
    merge_group(rings.kv.at[slot], chunk_of_step, group, keys, values, is_new, config)


def _merge_several(
    context: DecodeContext,
    cell: DecodeCell,
    slot: Int,
    first_token: Int,
    index: int,
    group: Int,
) -> None:
    """``merge`` for several new tokens, of which some may be of another block."""
    config, rings, phase = context.config, context.rings, context.phase
    tokens_per_chunk = config.tokens_per_chunk
    num_chunks = context.schedule.block_rows // config.rows_per_chunk
    begin = jnp.maximum(cell.new_place, 0)
    end = jnp.where(cell.new_place >= 0, new_end(phase, cell), 0)
    # The first new token of the sequence, and so its first query, may be before.
    origin = cell.visible_end - cell.num_queries
    first_new = cell.query + jnp.maximum(-origin, 0)
    margin = new_tokens_margin(config, phase)
    last_start = margin + tokens_per_step(phase) - 1
    for offset in range(_most_chunks(config.spec.decode_q_len, tokens_per_chunk)):
        chunk = (begin >> log2(tokens_per_chunk)) + offset
        # A chunk that is merged twice gets the same tokens twice.
        chunk = jnp.minimum(chunk, num_chunks - 1)
        first_place = chunk * tokens_per_chunk
        # Tokens that are not new are masked. Where none is, any do.
        start = margin + first_new - begin + first_place
        start = jnp.minimum(start, last_start)
        is_new = masking.live_word_mask(
            first_place, config.rows_per_chunk, config.cache.packing, begin, end
        )
        keys, values = (
            load_tokens(
                ring.at[slot],
                first_token - margin,
                start,
                tokens_per_chunk,
                group,
                config,
            )
            for ring in (rings.keys, rings.values)
        )
        chunk_of_step = index * num_chunks + chunk
        merge_group(
            rings.kv.at[slot], chunk_of_step, group, keys, values, is_new, config
        )


def _most_chunks(num_tokens: int, tokens_per_chunk: int) -> int:
    """Chunks that so many consecutive tokens may touch."""
    return (num_tokens + tokens_per_chunk - 2) // tokens_per_chunk + 1

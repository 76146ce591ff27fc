"""Merges the new tokens of a decode cell into its block."""

import jax.numpy as jnp
from jax import lax

from jax_kernels.ragged_paged_attention.kernel import masking, tile_io
from jax_kernels.ragged_paged_attention.kernel.decode.blocks import CellBlock
from jax_kernels.ragged_paged_attention.kernel.decode.buffers import (
    DecodeContext,
    kv_of_slot,
    new_tokens_margin,
)
from jax_kernels.ragged_paged_attention.kernel.decode.steps import (
    DecodeCell,
    Step,
    new_end,
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
    group: Int,
    block: CellBlock,
) -> None:
    """Merges the only new token of a decode cell, if the cell has it.

    It is part of a stretch, in the shadow of other work.

    Args:
      context: Gives buffers and geometry.
      cell: The cell.
      slot: Slot of its step.
      first_token: First token of the step, in the flat arrays.
      group: Word row of ``keys`` and ``values`` to merge: heads by their packing.
      block: The keys and values of the cell.
    """
    config, rings = context.config, context.rings
    place = jnp.maximum(cell.new_place, 0)
    chunk = place >> log2(config.tokens_per_chunk)
    is_new = masking.token_word_mask(
        cell.new_place - chunk * config.tokens_per_chunk,
        config.rows_per_chunk,
        config.cache.packing,
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
    first_head = group * config.new_heads_per_word
    factors, new = context.head_factors, []
    for head_offset, (key, value) in enumerate(zip(keys, values, strict=True)):
        head = first_head + head_offset
        packed = tile_io.pack_tokens(
            factors.multiply("key", key, head),
            factors.multiply("value", value, head),
            config,
        )
        new += [
            (head, part, words)
            for part, words in enumerate(packed)
            if words is not None
        ]
    if block.is_alone:
        block.merge(new, chunk, is_new)
        return
    for one in new:
        block.merge([one], chunk, is_new)


def merge_several(context: DecodeContext, step: Step, slot: Int, index: int) -> None:
    """Merges the new tokens of a decode cell, in all heads.

    Only the last cells of a sequence have any, so it is a loop over the chunks that
    hold some, and no part of a stretch.

    Args:
      context: Gives buffers and geometry.
      step: The step.
      slot: Its slot.
      index: Number of the cell within the step.
    """
    config, rings, phase = context.config, context.rings, context.phase
    cell, tokens_per_chunk = step.cells[index], config.tokens_per_chunk
    kv = kv_of_slot(context, slot)
    num_chunks = context.schedule.block_rows // config.rows_per_chunk
    begin = jnp.maximum(cell.new_place, 0)
    end = jnp.where(cell.new_place >= 0, new_end(phase, cell), 0)
    # The first new token of the sequence, and so its first query, may be before.
    num_before = jnp.maximum(cell.num_queries - cell.visible_end, 0)
    margin = new_tokens_margin(config, phase)
    # Where the rings would have a token that is at the start of the block.
    start = margin + cell.query + num_before - begin

    def merge_chunk(chunk: Int, _) -> None:
        place = chunk * tokens_per_chunk
        is_new = masking.live_word_mask(
            place, config.rows_per_chunk, config.cache.packing, begin, end
        )
        chunk_of_step = index * num_chunks + chunk
        for group in range(config.num_kv_heads // config.new_heads_per_word):
            # Tokens that are not new are masked.
            keys, values = (
                load_tokens(
                    ring.at[slot],
                    step.first_token - margin,
                    start + place,
                    tokens_per_chunk,
                    group,
                    config,
                )
                for ring in (rings.keys, rings.values)
            )
            merge_group(
                kv,
                chunk_of_step,
                group,
                keys,
                values,
                is_new,
                context.head_factors,
                config,
            )

    shift = log2(tokens_per_chunk)
    end_chunk = (end + (tokens_per_chunk - 1)) >> shift
    lax.fori_loop(begin >> shift, end_chunk, merge_chunk, None)

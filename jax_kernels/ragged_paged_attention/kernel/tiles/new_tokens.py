"""Merges the new tokens of a cell into its block, and carries those of earlier ones."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_kernels.ragged_paged_attention.config import KernelConfig
from jax_kernels.ragged_paged_attention.kernel import masking, tile_io
from jax_kernels.ragged_paged_attention.kernel.new_tokens import (
    load_tokens,
    merge_group,
    store_bits,
)
from jax_kernels.ragged_paged_attention.kernel.schedule import (
    Cell,
    Int,
    log2,
    slot_before,
)
from jax_kernels.ragged_paged_attention.kernel.tiles.buffers import (
    ONLY_SLOT,
    TileContext,
)
from jax_kernels.ragged_paged_attention.kernel.tiles.copies import (
    NewTokensPiece,
    TileCopies,
    flat_token,
    new_tokens_piece,
)
from jax_kernels.ragged_paged_attention.kernel.tiles.fetch import load_block
from jax_kernels.ragged_paged_attention.layout import LANES

# Numbers of a row, of all heads and the same in each of several chunks, that are merged
# at once: fewer would wait for their own loads.
MERGED_NUMBERS = 4 * LANES
# The same where keys and values are rounded in software, one after the other.
ROUNDED_NUMBERS = 32 * LANES
# The same where they are copied.
CARRIED_NUMBERS = 32 * LANES


def merge(context: TileContext, copies: TileCopies, cell: Cell, slot: Int) -> None:
    """Waits for the new tokens of a cell, of which there are some, and merges them.

    The first piece was fetched with the cell. The others, which are rare, are fetched
    here, one after the other.
    """

    config = context.config
    # While keys are rounded, which takes a while there, values arrive.
    is_split = config.numerics.rounds_in_software and not config.cache.is_fused_kv
    rounds = [("keys",), ("values",)] if is_split else [("keys", "values")]

    def piece(index: Int) -> Int:
        part = new_tokens_piece(context, cell, index)
        for names in rounds:
            for name in names:
                copies.wait_new_tokens(cell, part, name)
            _merge_piece(context, cell, slot, part, names)
        copies.start_new_tokens(cell, index + 1)
        return index + 1

    def is_left(index: Int) -> jax.Array:
        return new_tokens_piece(context, cell, index).origin < cell.new_end

    lax.while_loop(is_left, piece, jnp.int32(0))


def _merge_piece(
    context: TileContext,
    cell: Cell,
    slot: Int,
    part: NewTokensPiece,
    names: Sequence[str],
) -> None:
    """Merges new keys, values or both, one chunk of the block after the other."""
    config, rings = context.config, context.rings
    chunk_tokens = config.tokens_per_chunk
    first_chunk = (part.origin - cell.block_start) >> log2(chunk_tokens)
    origin_token = flat_token(cell, part.origin)

    def merge_chunks(index: Int, num_chunks: int, is_new: jax.Array | None) -> None:
        first = (index - first_chunk) * chunk_tokens
        for group in range(config.num_kv_heads // config.new_heads_per_word):
            loaded = {
                name: load_tokens(
                    getattr(rings, name).at[ONLY_SLOT],
                    origin_token,
                    first,
                    num_chunks * chunk_tokens,
                    group,
                    config,
                )
                for name in names
            }
            keys, values = loaded.get("keys"), loaded.get("values")
            merge_group(
                rings.kv.at[slot],
                index,
                group,
                keys,
                values,
                is_new,
                context.head_factors,
                config,
            )

    is_rounding = config.numerics.rounds_in_software
    at_once = _chunks_at_once(
        ROUNDED_NUMBERS if is_rounding else MERGED_NUMBERS, config
    )
    _for_chunks(cell.block_start, part.begin, part.end, at_once, merge_chunks, config)


def carry(context: TileContext, cell: Cell, slot: Int) -> None:
    """Copies the tokens that an earlier cell has merged into the same block.

    Packing them again would cost more, above all where the chip has no instruction
    for the dtype of the cache.

    Args:
      context: Gives buffers, notes and geometry.
      cell: A cell that is being received, and for which there is such an earlier cell.
      slot: Its slot.
    """
    config, kv = context.config, context.rings.kv
    source = _slot_of_same_block(context, cell, slot)

    def rows_of(a_slot: Int, head: int) -> tile_io.WordRows:
        return tile_io.WordRows(kv.at[a_slot, head], config.interpret)

    def copy(index: Int, num_chunks: int, is_carried: jax.Array | None) -> None:
        first_row = index * config.rows_per_chunk
        num_rows = num_chunks * config.rows_per_chunk
        heads = range(config.cache.heads_per_page)
        # All loads before the first store: the slots might be the same for all that
        # the compiler knows, and each load would wait for the store before it.
        words = [rows_of(source, h).load(first_row, num_rows) for h in heads]
        for head in heads:
            store_bits(rows_of(slot, head), first_row, words[head], is_carried)

    at_once = _chunks_at_once(CARRIED_NUMBERS, config)
    _for_chunks(
        cell.block_start, cell.carried_begin, cell.new_begin, at_once, copy, config
    )


def _slot_of_same_block(context: TileContext, cell: Cell, slot: Int) -> Int:
    """The slot of the last cell before this one that has the same block."""
    num_slots = context.phase.num_slots
    found = slot
    for distance in reversed(range(1, num_slots)):
        earlier = slot_before(slot, distance, num_slots)
        block = load_block(context, earlier)
        is_same = block.is_of(cell.sequence, cell.block_start)
        found = jnp.where(is_same, earlier, found)
    return found


def carry_seam(context: TileContext, cell: Cell, slot: Int) -> None:
    """Keeps the row of old and new tokens for the later tiles of the sequence."""
    seam = context.buffers.seam
    if seam is None:
        return
    packing = context.config.cache.packing
    row = (cell.new_start >> log2(packing)) - (cell.block_start >> log2(packing))
    has_seam = (cell.new_start & (packing - 1)) != 0
    in_block = (row >= 0) & (row < context.schedule.block_rows)
    many_tiles = (cell.num_tiles > 1) & (cell.num_queries > 0)
    row_ref = context.rings.kv.at[slot, :, pl.ds(jnp.maximum(row, 0), 1)]

    @pl.when(has_seam & in_block & many_tiles)
    def _():
        @pl.when(cell.tile == 0)
        def _():
            seam[...] = row_ref[...]

        @pl.when(cell.tile > 0)
        def _():
            row_ref[...] = seam[...]


def _chunks_at_once(numbers: int, config: KernelConfig) -> int:
    """Chunks with so many numbers in a row of all heads, a power of two."""
    at_once = max(numbers // (config.num_kv_heads * config.lanes), 1)
    return 1 << (at_once.bit_length() - 1)


def _for_chunks(
    block_start: Int,
    begin: Int,
    end: Int,
    at_once: int,
    do: Callable[[Int, int, jax.Array | None], None],
    config: KernelConfig,
) -> None:
    """Calls ``do`` with the chunks of a block that hold positions begin .. end.

    Args:
      block_start: Position of the first token of the block.
      begin: First position.
      end: Position after the last.
      at_once: Whole chunks that ``do`` is called with, as long as there are so many; a
        power of two.
      do: Takes the number of a chunk, how many there are from it on, and the bits of
        the positions within them, u32[rows, 1], or None for all. Only the chunks at the
        two ends may hold other positions as well; they come alone, and they may be the
        same chunk, which then comes twice.
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
            do(index, 1, bits)

    first_whole = (begin_place + config.tokens_per_chunk - 1) >> shift
    end_whole = end_place >> shift
    num_groups = jnp.maximum(end_whole - first_whole, 0) >> log2(at_once)

    def group(index: Int, _) -> None:
        do(first_whole + index * at_once, at_once, None)

    lax.fori_loop(0, num_groups, group, None)
    if at_once > 1:
        rest = first_whole + num_groups * at_once
        lax.fori_loop(rest, end_whole, lambda index, _: do(index, 1, None), None)

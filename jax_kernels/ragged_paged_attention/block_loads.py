"""Keys and values of one head of a block, as the matrix units take them."""

import jax

from jax_kernels.ragged_paged_attention import masking, tile_io
from jax_kernels.ragged_paged_attention.config import KernelConfig
from jax_kernels.ragged_paged_attention.dma import Copies
from jax_kernels.ragged_paged_attention.schedule import Cell, Int


def load_keys(copies: Copies, slot: Int, head: Int, size: int | None = None):
    """[size, lanes]; in a fused cache the lanes past head_dim hold values."""
    config = copies.config
    words = _load_words(copies, slot, head, size)
    return _to_tokens(words, config.multiply_dtype, config)


def load_values(
    copies: Copies,
    slot: Int,
    head: Int,
    words_mask: jax.Array | None,  # u32[size // packing, 1], or None: all live
    size: int | None = None,
) -> jax.Array:
    """[size, lanes], with zeros in dead slots."""
    config = copies.config
    first = 0 if config.cache.is_fused_kv else config.num_kv_heads
    words = _load_words(copies, slot, first + head, size)
    if words_mask is not None:
        words = words & words_mask
    return _to_tokens(words, config.value_dtype, config)


def _to_tokens(words: jax.Array, dtype, config: KernelConfig) -> jax.Array:
    return tile_io.words_to_tokens(
        words, config.cache.dtype, dtype, keep_float8=not config.interpret
    )


def value_words_mask(copies: Copies, cell: Cell, size: int | None = None) -> jax.Array:
    """The bits of a block that may meet probabilities.

    Dead slots of V may hold NaN or infinity, which a zero probability does not
    cancel. Rows before the window were not fetched at all.
    """
    packing = copies.config.cache.packing
    no_window = copies.config.spec.sliding_window is None
    return masking.live_word_mask(
        cell.block_start,
        (size or copies.schedule.phase.block_kv) // packing,
        packing,
        None if no_window else cell.visible_begin & -packing,
        cell.visible_end,
    )


def largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, limit + 1) if number % d == 0)


def _load_words(copies: Copies, slot: Int, head: Int, size: int | None) -> jax.Array:
    """u32[size // packing, lanes]: the first ``size`` tokens, by default all."""
    size = size or copies.schedule.phase.block_kv
    rows = tile_io.WordRows(copies.buffers.kv.at[slot, head], copies.config.interpret)
    return rows.load(0, size // copies.config.cache.packing)

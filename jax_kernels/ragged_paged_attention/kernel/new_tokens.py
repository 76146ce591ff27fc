"""New keys and values: how they lie in VMEM, and their place in a block as packed rows.

In bfloat16 two key heads of a token share 32-bit words. An odd head has no partner:
then two consecutive tokens of a head do, counted in the flat arrays. A sequence may
start at the second token of a word.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.config import KernelConfig
from jax_kernels.ragged_paged_attention.kernel import tile_io
from jax_kernels.ragged_paged_attention.kernel.refs import Shaped
from jax_kernels.ragged_paged_attention.kernel.schedule import Int
from jax_kernels.ragged_paged_attention.layout import dtype_packing


def ring_shape(config: KernelConfig, slots: int, num_tokens: int) -> Shaped:
    """A ring for consecutive new tokens: of keys, or of values.

    [slots, tokens, word rows, packing, io_lanes], or [slots, Hkv, words, packing,
    io_lanes] where tokens share words. Then it has room for a token more: the first
    one may be the second of its word.
    """
    packing = dtype_packing(config.q_dtype)
    if config.tokens_share_words:
        rows = config.num_kv_heads, num_tokens // packing + 1
    else:
        rows = num_tokens, tile_io.io_word_rows(config.num_kv_heads, packing)
    return Shaped((slots, *rows, packing, config.io_lanes), config.q_dtype)


def load_tokens(
    ring, origin_token: Int, first: Int, size: int, group: Int, config: KernelConfig
) -> list[jax.Array]:
    """Consecutive new tokens of the key heads that share a word row.

    Args:
      ring: VMEM, a slot of ``ring_shape``.
      origin_token: Number in the flat arrays of the token that the slot begins with.
      first: Number of the first token, counted from that one.
      size: Tokens to load; even.
      group: Number of the word row: heads by their packing.
      config: Gives dtypes and geometry.

    Returns:
      [size, io_lanes] of each head: f32, or bf16 where tokens share words.
    """
    if not config.tokens_share_words:
        rows, stride = tile_io.WordRows(ring, config.interpret), ring.shape[-3]
        words = rows.load(first * stride + group, size, stride)
        return tile_io.unpack_heads(words, dtype_packing(config.q_dtype))
    rows = tile_io.WordRows(ring.at[group], config.interpret)
    place = first + (origin_token & 1)
    first, num_words = place >> 1, size // 2
    # From the second half of a word, or none of it, into the next one.
    shift = ((place & 1) << 4).astype(jnp.uint32)
    lower = rows.load(first, num_words) >> shift
    upper = rows.load(first + 1, num_words) << jnp.uint32(1) << (jnp.uint32(31) - shift)
    return [pltpu.bitcast(lower | upper, jnp.bfloat16)]


def load_token(
    ring, origin_token: Int, number: Int, size: int, group: Int, config: KernelConfig
) -> list[jax.Array]:
    """One new token ``size`` times over; otherwise like ``load_tokens``."""
    if not config.tokens_share_words:
        rows = tile_io.WordRows(ring.at[number], config.interpret)
        word = rows.load(group, 1)
        words = jnp.broadcast_to(word, (size, word.shape[1]))
        return tile_io.unpack_heads(words, dtype_packing(config.q_dtype))
    rows = tile_io.WordRows(ring.at[group], config.interpret)
    place = number + (origin_token & 1)
    word = rows.load(place >> 1, 1) >> ((place & 1) << 4).astype(jnp.uint32)
    word = (word & jnp.uint32(0xFFFF)) | (word << jnp.uint32(16))
    words = jnp.broadcast_to(word, (size // 2, word.shape[1]))
    return [pltpu.bitcast(words, jnp.bfloat16)]


def merge_group(
    kv,
    chunk: Int,
    group: Int,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    is_new: jax.Array | None,
    config: KernelConfig,
) -> None:
    """Merges chunks of the heads that share a word row of the new tokens.

    Positions without a new token keep what they have.

    Args:
      kv: VMEM, [heads_per_page, rows, packing, lanes].
      chunk: Number of the first chunk: eight packed rows, a register per head.
      group: Number of the word row.
      keys: [tokens, io_lanes] of each head, as ``load_tokens`` returns them; whole
        chunks.
      values: The same.
      is_new: u32[rows, 1], the bits to take; None for all.
      config: Gives dtypes and geometry.
    """
    first_row = chunk * config.rows_per_chunk
    first_head = group * config.new_heads_per_word
    for offset, (key, value) in enumerate(zip(keys, values, strict=True)):
        head = first_head + offset
        for part, new in enumerate(tile_io.pack_tokens(key, value, config)):
            rows = tile_io.WordRows(
                kv.at[part * config.num_kv_heads + head], config.interpret
            )
            store_bits(rows, first_row, new, is_new)


def store_bits(
    rows: tile_io.WordRows,
    first_row: Int,
    new: jax.Array,
    mask: jax.Array | None,
) -> None:
    """Stores packed rows of one head; with a mask, only those bits of them."""
    if mask is not None:
        old = rows.load(first_row, new.shape[0])
        new = (new & mask) | (old & ~mask)
    rows.store(new, first_row)

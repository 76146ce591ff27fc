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
from jax_kernels.ragged_paged_attention.kernel.head_factors import HeadFactors
from jax_kernels.ragged_paged_attention.kernel.refs import Shaped
from jax_kernels.ragged_paged_attention.kernel.schedule import Int
from jax_kernels.ragged_paged_attention.token_layout import HeadRows, TokenRows


def ring_shape(config: KernelConfig, slots: int, num_tokens: int) -> Shaped:
    """A ring for consecutive new tokens: of keys, or of values.

    [slots, tokens, word rows, packing, row_lanes], or where tokens share words the
    shape of ``HeadRows.buffer_shape``, which has room for more: the first one may be in
    the middle of a piece.
    """
    layout = config.new_token_layout
    if isinstance(layout, HeadRows):
        shape = layout.buffer_shape(num_tokens)
    else:
        shape = num_tokens, layout.buffer_rows, layout.packing, layout.row_lanes
    return Shaped((slots, *shape), layout.dtype)


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
      [size, io_lanes] of each head: f32, or bf16 where tokens share words or need not
      be widened.
    """
    layout = config.new_token_layout
    if isinstance(layout, TokenRows):
        tokens = tile_io.TokenWords(ring, layout, config.interpret)
        words = tokens.load(group, first, size)
        if config.numerics.packs_16_bits:
            return tile_io.unpack_bfloat16(words)
        return tile_io.unpack_heads(words, layout.packing)
    place = first + (origin_token & (layout.tokens_per_piece - 1))
    first, num_words = place >> 1, size // 2
    # From the second half of a word, or none of it, into the next one.
    shift = ((place & 1) << 4).astype(jnp.uint32)
    lower = _load_words(ring, first, num_words, group, config) >> shift
    upper = _load_words(ring, first + 1, num_words, group, config)
    upper = upper << jnp.uint32(1) << (jnp.uint32(31) - shift)
    return [pltpu.bitcast(lower | upper, jnp.bfloat16)]


def load_token(
    ring, origin_token: Int, number: Int, size: int, group: Int, config: KernelConfig
) -> list[jax.Array]:
    """One new token ``size`` times over; otherwise like ``load_tokens``."""
    layout = config.new_token_layout
    if isinstance(layout, TokenRows):
        token = tile_io.TokenWords(ring.at[number], layout, config.interpret)
        word = token.load(group, 0, 1)
        words = jnp.broadcast_to(word, (size, word.shape[1]))
        return tile_io.unpack_heads(words, layout.packing)
    place = number + (origin_token & (layout.tokens_per_piece - 1))
    word = _load_words(ring, place >> 1, 1, group, config)
    word = word >> ((place & 1) << 4).astype(jnp.uint32)
    word = (word & jnp.uint32(0xFFFF)) | (word << jnp.uint32(16))
    words = jnp.broadcast_to(word, (size // 2, word.shape[1]))
    return [pltpu.bitcast(words, jnp.bfloat16)]


def _load_words(
    ring, first: Int, size: int, head: Int, config: KernelConfig
) -> jax.Array:
    """u32[size, io_lanes]: consecutive words of a head, two tokens each."""
    columns = [
        tile_io.WordRows(ring.at[head, column], config.interpret).load(first, size)
        for column in range(config.new_token_layout.columns)
    ]
    return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=1)


def merge_group(
    kv,
    chunk: Int,
    group: Int,
    keys: Sequence[jax.Array] | None,
    values: Sequence[jax.Array] | None,
    is_new: jax.Array | None,
    factors: HeadFactors,
    config: KernelConfig,
) -> None:
    """Merges chunks of the heads that share a word row of the new tokens.

    Positions without a new token keep what they have.

    Args:
      kv: VMEM, [heads_per_page, rows, packing, lanes].
      chunk: Number of the first chunk: eight packed rows, a register per head.
      group: Number of the word row.
      keys: [tokens, io_lanes] of each head, as ``load_tokens`` returns them; whole
        chunks. None: keys stay as they are, as ``tile_io.pack_tokens`` says.
      values: The same.
      is_new: u32[rows, 1], the bits to take; None for all.
      factors: Of new keys and values, where these differ by head.
      config: Gives dtypes and geometry.
    """
    first_row = chunk * config.rows_per_chunk
    first_head = group * config.new_heads_per_word
    for offset in range(config.new_heads_per_word):
        head = first_head + offset
        key, value = (
            None if x is None else factors.multiply(name, x[offset], head)
            for name, x in (("key", keys), ("value", values))
        )
        for part, new in enumerate(tile_io.pack_tokens(key, value, config)):
            if new is None:
                continue
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

"""Keys and values of one head of a block, as the matrix units take them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_kernels.ragged_paged_attention.config import KernelConfig
from jax_kernels.ragged_paged_attention.kernel import masking, tile_io
from jax_kernels.ragged_paged_attention.kernel.schedule import Int


def load_keys(
    kv,
    head: Int,
    size: int,
    config: KernelConfig,
    *,
    few_queries: bool,
    first_row: Int = 0,
) -> jax.Array:
    """[size, lanes]; in a fused cache the lanes past head_dim hold values.

    Args:
      kv: VMEM, [heads_per_page, rows, packing, lanes].
      head: Key head.
      size: Tokens to load.
      config: Gives dtypes and geometry.
      few_queries: Whether only some rows meet them. Where the matrix units do not take
        float8, the compiler then has the cheaper way to widen it.
      first_row: Row of the first token.
    """
    words = load_words(kv, head, size, config, first_row)
    return to_tokens(
        words, config.numerics.multiply_dtype, config, few_queries=few_queries
    )


def load_values(
    kv,
    head: Int,
    size: int,
    words_mask: jax.Array | None,  # u32[size // packing, 1], or None: all live
    config: KernelConfig,
    *,
    few_queries: bool,
    first_row: Int = 0,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """[size, lanes], with zeros at dead positions. Arguments as in ``load_keys``.

    ``dtype`` is that of the probabilities that they meet, by default ``value_dtype``.
    """
    first = 0 if config.cache.is_fused_kv else config.num_kv_heads
    words = load_words(kv, first + head, size, config, first_row)
    if words_mask is not None:
        words &= words_mask
    return to_tokens(
        words, dtype or config.numerics.value_dtype, config, few_queries=few_queries
    )


def to_tokens(
    words: jax.Array, dtype, config: KernelConfig, *, few_queries: bool
) -> jax.Array:
    """Packed rows as [tokens, lanes], for a product with what is of a dtype."""
    stored_dtype = _stored_dtype(dtype, config)
    if stored_dtype != config.cache.dtype:
        words = tile_io.without_negative_zeros(words)
    is_left_to_compiler = config.chip.multiplies_float8 or few_queries
    keep_float8 = is_left_to_compiler and not config.interpret
    return tile_io.words_to_tokens(words, stored_dtype, dtype, keep_float8=keep_float8)


def words_of_ones(dtype, config: KernelConfig) -> jax.Array:
    """u32: the word of packed rows of which ``to_tokens`` makes ones."""
    ones = np.ones(config.cache.packing, _stored_dtype(dtype, config))
    return jnp.uint32(ones.view(np.uint32)[0])


def _stored_dtype(dtype, config: KernelConfig) -> np.dtype:
    """What the tokens of the cache are taken as, for a product with a dtype."""
    if config.numerics.reads_e4m3_shifted and dtype == jnp.bfloat16:
        return jnp.dtype(jnp.float8_e4m3b11fnuz)
    return config.cache.dtype


def value_words_mask(
    visible_begin: Int, visible_end: Int, size: int, config: KernelConfig
) -> jax.Array:
    """The bits of tokens that may meet probabilities, u32[size // packing, 1].

    Dead positions of V may hold NaN or infinity, which a zero probability does not
    cancel. Rows before the window were not fetched at all.

    Args:
      visible_begin: First token that a query sees, counted from the first of ``size``.
      visible_end: The one after the last.
      size: Tokens.
      config: Gives packing and window.
    """
    packing = config.cache.packing
    begin = None
    if config.spec.attend == "new":
        begin = visible_begin
    elif config.spec.sliding_window is not None:
        begin = visible_begin & -packing
    return masking.live_word_mask(0, size // packing, packing, begin, visible_end)


def largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, limit + 1) if number % d == 0)


def load_words(
    kv, head: Int, size: int, config: KernelConfig, first_row: Int = 0
) -> jax.Array:
    """u32[size // packing, lanes], the packed rows of a head from one of them on."""
    rows = tile_io.WordRows(kv.at[head], config.interpret)
    return rows.load(first_row, size // config.cache.packing)

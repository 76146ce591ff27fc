"""VMEM buffers seen as arrays: word rows with a stride, heads, packing and unpacking.

Nothing here knows of DMA, sequences or masks. A buffer is ``[..., packing, lanes]``
with ``packing * itemsize == 4``; its last two axes are one *word row*: ``lanes``
32-bit words. Word rows are what the hardware loads and stores with any start and
any stride.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention import jax_versions
from jax_kernels.ragged_paged_attention.config import KernelConfig
from jax_kernels.ragged_paged_attention.layout import LANES, CacheLayout
from jax_kernels.ragged_paged_attention.token_layout import TokenRows

# Tests run on the Pallas interpreter, which indexes buffers but cannot reshape or
# bitcast them. There the twin below does the same to values.


class WordRows:
    """The word rows of a buffer, addressed by number.

    Args:
      ref: [..., packing, lanes] in VMEM; the leading axes are flattened.
      interpret: Use the twin for the Pallas interpreter.
    """

    def __init__(self, ref, interpret: bool):
        self._ref = ref
        self._interpret = interpret
        self._lanes = ref.shape[-1]
        self._num_rows = math.prod(ref.shape[:-2])

    def load(self, start, size: int, stride: int = 1) -> jax.Array:
        """u32[size, lanes]: rows start, start + stride, ..."""
        if self._interpret:
            rows = start + stride * jnp.arange(size, dtype=jnp.int32)
            return jnp.take(to_words(self._ref[...]), rows, axis=0, mode="clip")
        view, columns = self._columns()
        parts = [
            view[pl.ds(start * columns + column, size, stride * columns), :]
            for column in range(columns)
        ]
        return _concatenate(parts)

    def store(self, words: jax.Array, start, stride: int = 1) -> None:
        """Stores u32[size, lanes] to rows start, start + stride, ..."""
        size = words.shape[0]
        if self._interpret:
            rows = start + stride * jnp.arange(size, dtype=jnp.int32)
            everything = to_words(self._ref[...]).at[rows].set(words)
            self._ref[...] = from_words(everything, self._ref.shape, self._ref.dtype)
            return
        view, columns = self._columns()
        for column in range(columns):
            part = words[:, column * LANES : (column + 1) * LANES]
            view[pl.ds(start * columns + column, size, stride * columns), :] = part

    def _columns(self):
        """The buffer as [rows * columns, up to 128] words, for loads with a stride."""
        columns = max(self._lanes // LANES, 1)
        view = self._ref.bitcast(jnp.uint32)
        return view.reshape(self._num_rows * columns, min(self._lanes, LANES)), columns


class TokenWords:
    """The heads of tokens in a buffer, addressed by token and word.

    Args:
      ref: [tokens, word rows, packing, row_lanes] in VMEM; some last word rows of each
        token may be there for the memory banks. The axis of tokens may be missing.
      layout: Where the heads of a token are.
      interpret: As in ``WordRows``.
    """

    def __init__(self, ref, layout: TokenRows, interpret: bool):
        self._rows = WordRows(ref, interpret)
        self._layout = layout
        self._stride = ref.shape[-3]

    def load(self, word, first_token, num_tokens: int) -> jax.Array:
        """u32[num_tokens, lanes]: one word of consecutive tokens."""
        return _concatenate(
            [
                self._rows.load(start, num_tokens, self._stride)
                for start in self._starts(word, first_token)
            ]
        )

    def store(self, words: jax.Array, word, first_token) -> None:
        """Stores u32[num_tokens, lanes] to one word of consecutive tokens."""
        for column, start in enumerate(self._starts(word, first_token)):
            self._rows.store(self._of_column(words, column), start, self._stride)

    def load_words(self, first, size: int, multiple: int) -> jax.Array:
        """u32[size, lanes]: consecutive words of the first token.

        Args:
          first: The first word.
          size: How many; those past the last word of the token are anything.
          multiple: What ``first`` is known to be a multiple of.
        """
        step = self._step(size, multiple)
        parts = [self._starts(first + i, 0) for i in range(0, size, step)]
        columns = [
            [self._rows.load(starts[column], step) for starts in parts]
            for column in range(self._layout.columns)
        ]
        return _concatenate([_concatenate(column, axis=0) for column in columns])

    def store_words(self, words: jax.Array, first, multiple: int) -> None:
        """Stores u32[size, lanes] to consecutive words of the first token."""
        size = words.shape[0]
        step = self._step(size, multiple)
        for i in range(0, size, step):
            for column, start in enumerate(self._starts(first + i, 0)):
                part = self._of_column(words[i : i + step], column)
                self._rows.store(part, start)

    def _starts(self, word, token) -> list:
        """The word rows of a word, by column."""
        first = token * self._stride
        columns = range(self._layout.columns)
        return [first + self._layout.row(word, column) for column in columns]

    def _of_column(self, words: jax.Array, column: int) -> jax.Array:
        lanes = self._layout.row_lanes
        return words[:, column * lanes : (column + 1) * lanes]

    def _step(self, size: int, multiple: int) -> int:
        """Words whose word rows follow each other, from any multiple on."""
        if self._layout.columns == 1:
            return size
        return math.gcd(self._layout.words_per_piece, multiple, size)


def _concatenate(parts: list[jax.Array], axis: int = 1) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def to_words(value: jax.Array) -> jax.Array:
    """[..., packing, lanes] to u32[rows, lanes]; index 0 of packing in the low bits."""
    packing, lanes = value.shape[-2:]
    if packing > 1:
        value = jnp.moveaxis(value, -2, -1)
    else:
        value = value[..., 0, :]
    return jax.lax.bitcast_convert_type(value, jnp.uint32).reshape(-1, lanes)


def from_words(words: jax.Array, shape, dtype) -> jax.Array:
    """Inverse of ``to_words``."""
    *lead, packing, lanes = shape
    value = jax.lax.bitcast_convert_type(words, dtype)
    if packing > 1:
        value = jnp.moveaxis(value, -1, -2)
    return value.reshape(*lead, packing, lanes)


def unpack_heads(words: jax.Array, packing: int) -> list[jax.Array]:
    """The heads that share a word row, as f32 arrays: one (f32) or two (bf16)."""
    if packing == 1:
        return [pltpu.bitcast(words, jnp.float32)]
    # A bf16 is the upper half of the f32 of the same value.
    low = pltpu.bitcast(words << jnp.uint32(16), jnp.float32)
    high = pltpu.bitcast(words & jnp.uint32(0xFFFF0000), jnp.float32)
    return [low, high]


def unpack_bfloat16(words: jax.Array) -> list[jax.Array]:
    """The two heads that share a word row, as bf16 arrays."""
    words = pltpu.bitcast(words, jnp.int32)
    halves = words, words >> 16
    return [pltpu.bitcast(half.astype(jnp.int16), jnp.bfloat16) for half in halves]


def pack_heads(heads: list[jax.Array], interpret: bool) -> jax.Array:
    """Inverse of ``unpack_heads``, rounding to bf16 when there are two heads."""
    if len(heads) == 1:
        return pltpu.bitcast(heads[0], jnp.uint32)
    if jax_versions.HAS_PACK_ELEMENTWISE and not interpret:
        # One instruction on the newer chips.
        return pltpu.pack_elementwise(heads, packed_dtype=jnp.bfloat16)
    low, high = (
        pltpu.bitcast(head.astype(jnp.bfloat16).astype(jnp.float32), jnp.uint32)
        for head in heads
    )
    return (low >> jnp.uint32(16)) | high


def pack_rows(x: jax.Array, packing: int) -> jax.Array:
    """f32[rows, lanes] to u32[rows // packing, lanes]: consecutive rows share words."""
    if packing == 1:
        return pltpu.bitcast(x, jnp.uint32)
    return pltpu.bitcast(x.astype(jnp.bfloat16), jnp.uint32)


def widen(x: jax.Array, lanes: int) -> jax.Array:
    """Appends zero lanes: ``[rows, D]`` to ``[rows, lanes]``."""
    rows, width = x.shape
    if width == lanes:
        return x
    return jnp.concatenate([x, jnp.zeros((rows, lanes - width), x.dtype)], axis=1)


def prepare_queries(x: jax.Array, config: KernelConfig) -> jax.Array:
    """f32 queries, multiplied and cast to what meets the keys."""
    numerics = config.numerics
    if numerics.query_multiplier != 1.0:
        x = x * numerics.query_multiplier
    if numerics.quantised_dtype is None:
        return x.astype(numerics.multiply_dtype)
    x = quantise(x, numerics.quantised_dtype)
    if numerics.quantised_dtype == numerics.multiply_dtype:
        return x
    x = x.astype(jnp.float32) * numerics.quantised_multiplier
    return x.astype(numerics.multiply_dtype)


def quantise(x: jax.Array, dtype) -> jax.Array:
    """f32 (already scaled) to ``dtype``; 8-bit types are clipped to their range."""
    if dtype == jnp.int8:
        return jnp.clip(jnp.round(x), -128.0, 127.0).astype(jnp.int32).astype(jnp.int8)
    if jnp.dtype(dtype).itemsize == 1:
        # Without the clip an overflow becomes NaN (e4m3fn) or infinity (e5m2).
        limit = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -limit, limit)
    return x.astype(dtype)


def pack_tokens(
    keys: jax.Array | None,  # f32 or bf16[tokens, io_lanes]
    values: jax.Array | None,  # the same
    config: KernelConfig,
) -> list[jax.Array | None]:
    """Packed rows of consecutive tokens of one head.

    Either may be None, and then its rows are, where the two do not share a row.

    Returns:
      u32[tokens // packing, lanes]: keys and values apart, or one array that holds
      both when they share a row.
    """
    cache, numerics = config.cache, config.numerics
    in_words = numerics.packs_16_bits and jnp.bfloat16 in [
        x.dtype for x in (keys, values) if x is not None
    ]

    def widened(x: jax.Array, multiplier: float | None) -> jax.Array:
        x = pltpu.bitcast(x, jnp.uint32) if in_words else x.astype(jnp.float32)
        x = widen(x, cache.lanes)
        return x if multiplier is None else x * multiplier

    def rounded(x: jax.Array) -> jax.Array:
        if in_words:
            x = pltpu.bitcast(x, jnp.bfloat16)
        if numerics.rounds_in_16_bits:
            return bfloat16_to_e4m3fn(x.astype(jnp.bfloat16))
        return pltpu.bitcast(quantise(x, cache.dtype), jnp.uint32)

    rows = [
        None if x is None else widened(x, multiplier)
        for x, multiplier in (
            (keys, numerics.key_multiplier),
            (values, numerics.value_multiplier),
        )
    ]
    if cache.is_fused_kv:
        keys, values = rows
        assert keys is not None and values is not None
        values = pltpu.roll(values, cache.value_lane, 1)
        lane = jax.lax.broadcasted_iota(jnp.int32, keys.shape, 1)
        rows = [jnp.where(lane < cache.value_lane, keys, values)]
    return [None if x is None else rounded(x) for x in rows]


def bfloat16_to_e4m3fn(x: jax.Array) -> jax.Array:
    """Rounds like ``quantise``, two elements per 32-bit lane.

    With e the power of two at or below a magnitude a, ``a + 16 * e`` rounds a to three
    bits after the leading one: bfloat16 has seven, and the sum leads by four. The
    smallest normal of e4m3fn in the place of e gives its subnormal numbers as well. So
    the code of a, ``8 * (exponent of e) + (a / e, in eighths)`` and a constant, is the
    sum's bits without those of e, plus those of e four places lower.

    Args:
      x: bf16[rows, lanes], four rows to a word.

    Returns:
      u32[rows // 4, lanes]
    """

    def pairs(value: jax.Array) -> jax.Array:
        return pltpu.bitcast(value, jnp.uint32)

    def int16(value: jax.Array) -> jax.Array:
        return pltpu.bitcast(value, jnp.int16)

    def bfloat16(value: jax.Array) -> jax.Array:
        return pltpu.bitcast(value, jnp.bfloat16)

    bits = pairs(x)
    magnitude = bits & jnp.uint32(0x7FFF7FFF)

    limits = jnp.finfo(jnp.float8_e4m3fn)
    a = jnp.minimum(bfloat16(magnitude), jnp.bfloat16(limits.max))  # NaN stays NaN
    e = bfloat16(pairs(a) & jnp.uint32(0x7F807F80))
    e = int16(jnp.maximum(e, jnp.bfloat16(limits.smallest_normal)))
    # 0x200 multiplies by 16. 0x38 is -8 * 121 in the low byte: the smallest normal has
    # the exponent field 121, eight eighths and the code 8. An even number of eighths
    # leaves ties to even.
    rounded = pairs(a + bfloat16(e + jnp.int16(0x200 + 0x38)))
    rounded &= jnp.uint32(0x7FFF7FFF)  # the sign of a NaN is not known
    code = (int16(rounded) - e) + int16(pairs(e) >> jnp.uint32(4))
    # The low byte is the code, and the high byte is 6. NaN gives more than any number,
    # also as bfloat16, whose smaller one the chip can take.
    nan = jax.lax.bitcast_convert_type(jnp.int16(0x67F), jnp.bfloat16)
    code = int16(jnp.minimum(bfloat16(pairs(code)), nan))
    codes, upper = (
        pltpu.bitcast(value.astype(jnp.int8), jnp.uint32)
        for value in (code, int16(bits >> jnp.uint32(8)))
    )
    return codes | (upper & jnp.uint32(0x80808080))


def words_to_tokens(
    words: jax.Array, stored_dtype, dtype, *, keep_float8: bool = False
) -> jax.Array:
    """u32[rows, lanes] of the cache to [rows * packing, lanes] for a product.

    Args:
      words: Packed rows.
      stored_dtype: That of the cache.
      dtype: That of the other operand.
      keep_float8: Leave float8 as it is beside bf16. The product is the same, and
        the newer matrix units take both.
    """
    tokens = pltpu.bitcast(words, stored_dtype)
    is_float8 = jnp.issubdtype(tokens.dtype, jnp.floating) and tokens.itemsize == 1
    if keep_float8 and is_float8 and dtype == jnp.bfloat16:
        return tokens
    return tokens.astype(dtype)


def without_negative_zeros(words: jax.Array) -> jax.Array:
    """Bytes 0x80 made 0: a negative zero of e4m3fn, but a NaN of e4m3b11fnuz.

    A byte with any bit but the highest carries into the highest, and keeps it.
    """
    others = jnp.uint32(0x7F7F7F7F)
    return words & (((words & others) + others) | others)


def value_lanes_first(x: jax.Array, cache: CacheLayout) -> jax.Array:
    """Moves the values of a fused row from their lanes to lane 0."""
    return pltpu.roll(x, cache.value_lane, 1) if cache.is_fused_kv else x

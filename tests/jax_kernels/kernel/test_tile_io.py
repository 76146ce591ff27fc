"""Loads, stores and packing, against numpy on the bytes."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jax_kernels import chips
from jax_kernels.ragged_paged_attention import layout
from jax_kernels.ragged_paged_attention.config import AttentionSpec, KernelConfig
from jax_kernels.ragged_paged_attention.kernel import tile_io
from jax_kernels.ragged_paged_attention.layout import CacheLayout
from jax_kernels.ragged_paged_attention.token_layout import TokenRows
from tests.conftest import HAS_TPU
from tests.support import oracle

PACKINGS = {"float32": 1, "bfloat16": 2, "float8_e4m3fn": 4, "int8": 4}


class ArrayRef:
    """Stands in for a Pallas reference that is read and written as a whole."""

    def __init__(self, value):
        self.value = jnp.asarray(value)
        self.shape, self.dtype = self.value.shape, self.value.dtype

    def __getitem__(self, index):
        return self.value[index]

    def __setitem__(self, index, value):
        assert value.shape == self.shape and value.dtype == self.dtype
        self.value = self.value.at[index].set(value)


def compiled(function, *arrays, **static):
    """The result on arrays. Some Pallas operations cannot run one by one."""
    return jax.jit(functools.partial(function, **static))(*arrays)


def random_buffer(shape, dtype, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 20).astype(dtype)


def words_of(buffer: np.ndarray) -> np.ndarray:
    """u32[rows, lanes]: in each word the elements along ``packing``, lowest first."""
    packing, lanes = buffer.shape[-2:]
    as_bytes = buffer.view(np.uint8).reshape(-1, packing, lanes, 4 // packing)
    in_order = as_bytes.transpose(0, 2, 1, 3).reshape(-1, lanes, 4)
    return np.ascontiguousarray(in_order).view(np.uint32)[..., 0]


@pytest.mark.parametrize("lanes", [40, 128, 256])
@pytest.mark.parametrize("dtype", PACKINGS)
def test_words_hold_the_elements_of_a_row_lowest_first(dtype, lanes):
    buffer = random_buffer((3, 5, PACKINGS[dtype], lanes), dtype)
    words = tile_io.to_words(jnp.asarray(buffer))
    np.testing.assert_array_equal(words, words_of(buffer))
    back = tile_io.from_words(words, buffer.shape, buffer.dtype)
    np.testing.assert_array_equal(np.asarray(back), buffer)


@pytest.mark.parametrize("start, size, stride", [(0, 15, 1), (3, 4, 1), (1, 5, 3)])
@pytest.mark.parametrize("dtype", PACKINGS)
def test_rows_are_loaded_and_stored_by_start_and_stride(dtype, start, size, stride):
    buffer = random_buffer((3, 5, PACKINGS[dtype], 128), dtype)
    other = words_of(random_buffer((size, PACKINGS[dtype], 128), dtype, seed=1))
    ref = ArrayRef(buffer)
    rows = tile_io.WordRows(ref, interpret=True)
    wanted = slice(start, start + (size - 1) * stride + 1, stride)

    loaded = rows.load(start, size, stride)
    np.testing.assert_array_equal(loaded, words_of(buffer)[wanted])

    rows.store(jnp.asarray(other), start, stride)
    expected = words_of(buffer)
    expected[wanted] = other
    np.testing.assert_array_equal(words_of(np.asarray(ref.value)), expected)


@pytest.mark.parametrize("lanes", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_words_of_tokens_are_found_and_stored(dtype, lanes):
    num_tokens, num_heads, packing = 5, 8, PACKINGS[dtype]
    layout = TokenRows(num_heads, lanes, jnp.dtype(dtype))
    shape = num_tokens, layout.buffer_rows, packing, layout.row_lanes
    x = random_buffer((num_tokens, num_heads // packing, packing, lanes), dtype)
    words = words_of(x).reshape(num_tokens, -1, lanes)
    view = layout.view(jnp.asarray(x.reshape(num_tokens, num_heads, lanes)))
    ref = ArrayRef(jnp.zeros(shape, dtype).at[:, : layout.num_rows].set(view))

    tokens = tile_io.TokenWords(ref, layout, interpret=True)
    np.testing.assert_array_equal(tokens.load(2, 1, 3), words[1:4, 2])
    # Words 2 and 3 begin at a multiple of 2, and 3 alone at any.
    np.testing.assert_array_equal(tokens.load_words(2, 2, 2), words[0, 2:4])
    np.testing.assert_array_equal(tokens.load_words(1, 3, 1), words[0, 1:4])

    other = jnp.asarray(words[::-1])
    tokens.store(other[1:4, 2], 2, 1)
    np.testing.assert_array_equal(tokens.load(2, 0, 5)[1:4], other[1:4, 2])
    np.testing.assert_array_equal(tokens.load(1, 0, 5), words[:, 1])
    tokens.store_words(other[0, 1:4], 1, 1)
    np.testing.assert_array_equal(tokens.load_words(1, 3, 1), other[0, 1:4])
    np.testing.assert_array_equal(tokens.load(0, 0, 5), words[:, 0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_survive_unpacking_and_packing(dtype):
    packing = PACKINGS[dtype]
    buffer = random_buffer((8, packing, 128), dtype)
    words = jnp.asarray(words_of(buffer))
    heads = compiled(tile_io.unpack_heads, words, packing=packing)
    assert len(heads) == packing
    for index, head in enumerate(heads):
        np.testing.assert_array_equal(head, buffer[:, index].astype(np.float32))
    np.testing.assert_array_equal(
        compiled(tile_io.pack_heads, heads, interpret=True), words
    )


def test_heads_of_16_bits_are_taken_apart_as_they_are():
    buffer = random_buffer((8, 2, 128), "bfloat16")
    heads = compiled(tile_io.unpack_bfloat16, jnp.asarray(words_of(buffer)))
    for index, head in enumerate(heads):
        np.testing.assert_array_equal(np.asarray(head), buffer[:, index])


def test_packing_heads_rounds_to_nearest_even():
    """bf16 has 8 bits: 1 + 1/256 lies halfway between 1 and 1 + 1/128."""
    low = jnp.full((1, 128), 1 + 1 / 256, jnp.float32)
    high = jnp.full((1, 128), 1 + 3 / 256, jnp.float32)
    words = np.asarray(compiled(tile_io.pack_heads, [low, high], interpret=True))
    got = words.view(ml_dtypes.bfloat16).reshape(1, 128, 2).astype(np.float32)
    np.testing.assert_array_equal(got[0, 0], [1.0, 1 + 4 / 256])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_consecutive_rows_share_words(dtype):
    packing = PACKINGS[dtype]
    buffer = random_buffer((4, packing, 128), dtype)
    rows = jnp.asarray(buffer.reshape(-1, 128).astype(np.float32))
    words = compiled(tile_io.pack_rows, rows, packing=packing)
    np.testing.assert_array_equal(words, words_of(buffer))


def test_widening_appends_zeros():
    x = jnp.ones((2, 40))
    wide = np.asarray(tile_io.widen(x, 128))
    assert wide.shape == (2, 128)
    np.testing.assert_array_equal(wide[:, :40], 1)
    np.testing.assert_array_equal(wide[:, 40:], 0)
    assert tile_io.widen(x, 40) is x


QUANTISED = {
    # halves round to even, beyond the range is clipped
    "int8": ([0.5, 1.5, -2.5, 127.4, 300.0, -300.0], [0, 2, -2, 127, 127, -128]),
    # 3 bits of mantissa: from 16 in steps of 2, up to 448
    "float8_e4m3fn": ([17.0, 19.0, 500.0, -1e9], [16.0, 20.0, 448.0, -448.0]),
    # 2 bits of mantissa: from 8 in steps of 2, up to 57344
    "float8_e5m2": ([9.0, 11.0, 1e9, -6e4], [8.0, 12.0, 57344.0, -57344.0]),
    # not an 8-bit type: not clipped
    "bfloat16": ([1e38, 257.0], [1e38, 256.0]),
}


@pytest.mark.parametrize("dtype", QUANTISED)
def test_quantising_clips_and_rounds_to_even(dtype):
    """Rule 10: without the clip e4m3 overflows to NaN and e5m2 to infinity."""
    numbers, expected = QUANTISED[dtype]
    got = tile_io.quantise(jnp.asarray(numbers, jnp.float32), jnp.dtype(dtype))
    assert got.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(got), np.array(expected, dtype))


@pytest.mark.parametrize("scales", [{}, {"k_scale": 0.1, "v_scale": 3.0}], ids=str)
@pytest.mark.parametrize("head_dim", [32, 40, 64, 72, 128, 256])
@pytest.mark.parametrize("dtype", [*PACKINGS, "float8_e5m2"])
@pytest.mark.parametrize("q_dtype", ["float32", "bfloat16"])
def test_new_tokens_are_packed_as_the_cache_lays_them_out(
    q_dtype, dtype, head_dim, scales
):
    """Against layout.pack_kv_cache, which the oracle checks by its own arithmetic."""
    num_tokens = 8 * (4 // jnp.dtype(dtype).itemsize)
    spec = AttentionSpec(**scales)
    config = KernelConfig(
        spec=spec,
        cache=CacheLayout(1, num_tokens, 1, head_dim, dtype),
        phases=(),
        num_tokens=num_tokens,
        pages_per_sequence=1,
        num_q_heads=1,
        q_dtype=jnp.dtype(q_dtype),
        out_dtype=jnp.dtype(q_dtype),
    )
    keys, values = random_buffer((2, num_tokens, head_dim), config.q_dtype)
    parts = compiled(
        tile_io.pack_tokens, jnp.asarray(keys), jnp.asarray(values), config=config
    )
    stored = np.stack(
        [
            oracle.store(keys, dtype, spec.k_scale),
            oracle.store(values, dtype, spec.v_scale),
        ]
    )
    cache = np.asarray(layout.pack_kv_cache(stored[None, :, None]))
    words = words_of(cache).reshape(cache.shape[1], -1, cache.shape[-1])
    assert len(parts) == len(words)
    np.testing.assert_array_equal(np.stack(parts), words)


@pytest.mark.parametrize("chip", ["v6e", "tpu7x"])
def test_keys_or_values_are_packed_alone_where_they_share_no_row(chip):
    config = KernelConfig(
        spec=AttentionSpec(),
        cache=CacheLayout(1, 32, 1, 128, "float8_e4m3fn"),
        phases=(),
        num_tokens=32,
        pages_per_sequence=1,
        num_q_heads=1,
        q_dtype=jnp.dtype("bfloat16"),
        out_dtype=jnp.dtype("bfloat16"),
        chip=chips.CHIPS[chip],
        interpret=True,
    )
    keys, values = random_buffer((2, 32, 128), config.q_dtype)
    both = compiled(tile_io.pack_tokens, keys, values, config=config)
    first = compiled(tile_io.pack_tokens, keys, None, config=config)
    second = compiled(tile_io.pack_tokens, None, values, config=config)
    assert first[1] is None and second[0] is None
    np.testing.assert_array_equal(first[0], both[0])
    np.testing.assert_array_equal(second[1], both[1])


@pytest.mark.parametrize("dtype", PACKINGS)
def test_cache_words_unpack_to_tokens_in_order(dtype):
    packing = PACKINGS[dtype]
    tokens = random_buffer((8, packing, 128), dtype)
    unpacked = compiled(
        tile_io.words_to_tokens,
        jnp.asarray(words_of(tokens)),
        stored_dtype=jnp.dtype(dtype),
        dtype=jnp.dtype(jnp.float32),
    )
    expected = tokens.reshape(-1, 128).astype(np.float32)
    np.testing.assert_array_equal(unpacked, expected)


def test_only_negative_zeros_lose_their_sign():
    every_byte = np.arange(256, dtype=np.uint8)
    expected = np.where(every_byte == 0x80, 0, every_byte).astype(np.uint8)
    # Each byte beside each other one, so that a carry would show.
    pairs = np.stack(np.broadcast_arrays(every_byte[:, None], every_byte), axis=-1)
    words = np.repeat(pairs, 2, axis=-1).reshape(-1, 4).view(np.uint32)
    got = np.asarray(compiled(tile_io.without_negative_zeros, jnp.asarray(words)))
    np.testing.assert_array_equal(got.view(np.uint8), expected[words.view(np.uint8)])


@pytest.mark.parametrize("head_dim, lane", [(40, 64), (64, 64), (96, 0), (256, 0)])
def test_values_are_moved_to_the_first_lane(head_dim, lane):
    cache = CacheLayout(1, 16, 1, head_dim, "bfloat16")
    x = jnp.arange(cache.lanes, dtype=jnp.float32)[None]
    moved = np.asarray(compiled(tile_io.value_lanes_first, x, cache=cache))
    np.testing.assert_array_equal(moved[0, :head_dim], np.arange(head_dim) + lane)


def test_every_bfloat16_is_rounded_to_e4m3fn_as_numpy_does():
    """Numbers beyond the range are clipped; NaN and the signs of zeros are kept."""
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    every = every.reshape(512, 128)
    with np.errstate(invalid="ignore"):
        clipped = np.clip(every.astype(np.float32), -448, 448)
        expected = clipped.astype(ml_dtypes.float8_e4m3fn).reshape(128, 4, 128)

    def kernel(x_ref, words_ref):
        words_ref[...] = tile_io.bfloat16_to_e4m3fn(x_ref[...])

    words = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((128, 128), jnp.uint32),
        interpret=not HAS_TPU,
    )(jnp.asarray(every))
    np.testing.assert_array_equal(np.asarray(words), words_of(expected))

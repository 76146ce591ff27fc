"""Tests of ``jax_kernels.ragged_paged_attention.layout``."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_kernels.ragged_paged_attention as rpa
from jax_kernels.ragged_paged_attention import layout
from tests.support import oracle

pytestmark = pytest.mark.versions

DTYPES = ["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"]

geometries = st.fixed_dictionaries(
    {
        "num_pages": st.integers(1, 3),
        "page_size": st.sampled_from([8, 16, 32]),
        "num_kv_heads": st.integers(1, 5),
        "head_dim": st.integers(32, 512),
        "dtype": st.sampled_from(DTYPES),
    }
)


def random_pages(seed, *, num_pages, page_size, num_kv_heads, head_dim, dtype):
    shape = (num_pages, 2, num_kv_heads, page_size, head_dim)
    rng = np.random.default_rng(seed)
    itemsize = jnp.dtype(dtype).itemsize
    bits = rng.integers(0, 256, (*shape[:-1], head_dim * itemsize), np.uint8)
    return bits.view(jnp.dtype(dtype))


def bytes_of(array):
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize(
    "dtype, packing", [("float32", 1), ("bfloat16", 2), ("int8", 4), ("float8_e5m2", 4)]
)
def test_packing_fills_four_bytes(dtype, packing):
    assert layout.dtype_packing(dtype) == packing


def test_packing_of_eight_bytes_is_refused():
    with pytest.raises(ValueError, match=r"dtype must have 1, 2 or 4 bytes.*complex64"):
        layout.dtype_packing("complex64")


@given(st.integers(0, 10**6), st.integers(1, 10**4))
def test_align_to_is_the_least_multiple_not_below(value, multiple):
    aligned = layout.align_to(value, multiple)
    assert aligned % multiple == 0
    assert value <= aligned < value + multiple


@pytest.mark.parametrize(
    "head_dim, dtype, shape",
    [
        (128, "bfloat16", (10, 16, 64, 2, 128)),
        (128, "float8_e4m3fn", (10, 16, 32, 4, 128)),
        (128, "float32", (10, 16, 128, 1, 128)),
        (256, "bfloat16", (10, 16, 64, 2, 256)),
        (96, "bfloat16", (10, 16, 64, 2, 128)),
        (65, "int8", (10, 16, 32, 4, 128)),
        (64, "bfloat16", (10, 8, 64, 2, 128)),
        (32, "float8_e5m2", (10, 8, 32, 4, 128)),
    ],
)
def test_cache_shape_of_ten_pages_of_128_tokens_and_8_heads(head_dim, dtype, shape):
    assert layout.kv_cache_shape(10, 128, 8, head_dim, dtype) == shape


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_no_bytes_are_wasted_when_heads_fill_their_lanes(head_dim):
    shape = layout.kv_cache_shape(3, 16, 2, head_dim, "bfloat16")
    assert math.prod(shape) == 3 * 16 * 2 * head_dim * 2


@settings(deadline=None, max_examples=40)
@given(geometry=geometries)
def test_layout_is_recovered_from_the_shape(geometry):
    shape = layout.kv_cache_shape(**geometry)
    recovered = layout.cache_layout(
        shape, geometry["dtype"], geometry["num_kv_heads"], geometry["head_dim"]
    )
    sizes = {k: v for k, v in geometry.items() if k != "dtype"}
    assert recovered == layout.CacheLayout(**sizes, dtype_name=geometry["dtype"])
    assert recovered.shape == shape
    assert recovered.rows_per_page * recovered.packing == recovered.page_size
    num_bytes = math.prod(shape) * recovered.dtype.itemsize
    assert recovered.page_bytes * recovered.num_pages == num_bytes
    assert recovered.token_bytes * recovered.page_size == recovered.page_bytes


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(geometry=geometries, seed=st.integers(0, 99))
def test_unpack_inverts_pack_in_every_byte(geometry, seed):
    pages = random_pages(seed, **geometry)
    cache = layout.pack_kv_cache(pages)
    assert cache.shape == layout.kv_cache_shape(**geometry)
    assert cache.dtype == pages.dtype
    unpacked = layout.unpack_kv_cache(
        cache, geometry["num_kv_heads"], geometry["head_dim"]
    )
    # A float moved by a CPU may change the payload of a NaN, nothing else.
    is_nan = np.isnan(pages.astype(np.float32))
    itemwise = f"u{pages.dtype.itemsize}"
    got, want = (np.asarray(x).view(itemwise) for x in (unpacked, pages))
    np.testing.assert_array_equal(got[~is_nan], want[~is_nan])
    assert np.isnan(np.asarray(unpacked)[is_nan].astype(np.float32)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [40, 96, 200])
def test_numbers_that_are_subnormal_are_kept(head_dim, dtype):
    itemsize = jnp.dtype(dtype).itemsize
    bits = np.full((1, 2, 1, 8, head_dim), 3, f"u{itemsize}")
    cache = layout.pack_kv_cache(bits.view(jnp.dtype(dtype)))
    unpacked = np.asarray(layout.unpack_kv_cache(cache, 1, head_dim))
    np.testing.assert_array_equal(unpacked.view(bits.dtype), bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 65, 128, 129, 256, 300])
def test_every_vector_is_at_the_address_that_the_oracle_computes(head_dim, dtype):
    num_pages, num_kv_heads, page_size = 3, 2, 8
    pages = np.random.default_rng(0).integers(
        -8, 8, (num_pages, 2, num_kv_heads, page_size, head_dim)
    )
    pages = pages.astype(jnp.dtype(dtype))
    cache = np.asarray(layout.pack_kv_cache(pages))
    address = oracle.slot_address(cache, num_kv_heads, head_dim, page_size)
    page, slot = np.array(list(itertools.product(range(num_pages), range(page_size)))).T
    keys, values = oracle.read_slots(cache, address, page, slot)
    np.testing.assert_array_equal(bytes_of(keys), bytes_of(pages[page, 0, :, slot]))
    np.testing.assert_array_equal(bytes_of(values), bytes_of(pages[page, 1, :, slot]))


def test_lanes_of_padding_are_zero():
    split = np.asarray(layout.pack_kv_cache(np.ones((2, 2, 3, 8, 96), np.float32)))
    assert (split[..., :96] == 1).all() and (split[..., 96:] == 0).all()
    fused = np.asarray(layout.pack_kv_cache(np.ones((2, 2, 3, 8, 40), np.float32)))
    lane = np.arange(128) % 64
    assert (fused[..., lane < 40] == 1).all() and (fused[..., lane >= 40] == 0).all()


def test_split_layout_is_a_plain_reshape_of_pages():
    pages = np.arange(2 * 2 * 3 * 8 * 128, dtype=np.float32).reshape(2, 2, 3, 8, 128)
    cache = layout.pack_kv_cache(pages)
    np.testing.assert_array_equal(np.asarray(cache).ravel(), pages.ravel())


def test_packing_works_under_jit_and_is_public():
    pages = jnp.ones((2, 2, 3, 8, 40), jnp.bfloat16)
    cache = jax.jit(rpa.pack_kv_cache)(pages)
    assert cache.shape == rpa.kv_cache_shape(2, 8, 3, 40, jnp.bfloat16)
    unpack = jax.jit(rpa.unpack_kv_cache, static_argnums=(1, 2))
    assert unpack(cache, 3, 40).shape == pages.shape


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "bfloat16", jnp.dtype("bfloat16")])
def test_sizes_are_checked_by_the_contract(dtype):
    with pytest.raises(ValueError, match="page_size must be a power of two"):
        layout.kv_cache_shape(4, 24, 2, 64, dtype)
    with pytest.raises(NotImplementedError, match="head_dim 513 is not supported"):
        layout.kv_cache_shape(4, 16, 2, 513, dtype)
    with pytest.raises(ValueError, match="kv_cache of bfloat16 must be made for 2 key"):
        layout.cache_layout((4, 4, 8, 2, 128), dtype, num_kv_heads=2, head_dim=64)


@pytest.mark.parametrize("shape", [(4, 2, 8, 64), (4, 3, 2, 8, 64)])
def test_pack_refuses_what_is_not_pages(shape):
    with pytest.raises(ValueError, match="pages must have shape"):
        layout.pack_kv_cache(np.zeros(shape, np.float32))

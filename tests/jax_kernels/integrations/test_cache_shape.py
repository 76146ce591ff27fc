"""The shape in which tpu-inference has the cache."""

import jax
import jax.numpy as jnp
import pytest

from jax_kernels.contract.cache import CacheGeometry
from jax_kernels.integrations.tpu_inference import cache_shape


@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "dtype", "expected"),
    [
        (4, 128, "bfloat16", (9, 16, 4, 2, 128)),
        (1, 128, "bfloat16", (9, 16, 1, 2, 128)),
        (2, 64, "bfloat16", (9, 16, 1, 2, 128)),
        (8, 256, "float8_e4m3fn", (9, 16, 4, 4, 256)),
        (4, 512, "bfloat16", (9, 16, 4, 2, 512)),
        (2, 128, "float32", (9, 16, 4, 1, 128)),
        # An odd part of 4 bytes is left: pages are axis 0 alone.
        (1, 64, "bfloat16", (9, 1, 1, 8, 2, 128)),
        (1, 128, "float8_e4m3fn", (9, 1, 2, 4, 4, 128)),
        # Narrow heads are padded.
        (4, 32, "bfloat16", (9, 16, 4, 2, 128)),
    ],
)
def test_shape(num_kv_heads, head_dim, dtype, expected):
    shape = cache_shape.engine_shape(9, 16, num_kv_heads, head_dim, dtype)
    assert shape == expected
    assert cache_shape.has_pages_on_axis_1(shape) == (expected[1] == 16)
    kernel = cache_shape.kernel_shape(shape)
    padded = cache_shape.padded_head_dim(head_dim)
    assert kernel == CacheGeometry(9, 16, num_kv_heads, padded, dtype).shape


@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "dtype"),
    [
        (4, 128, "bfloat16"),
        (1, 64, "bfloat16"),
        (8, 256, "float8_e4m3fn"),
        (1, 128, "int8"),
    ],
)
def test_heads_alone_scale_axis_2(num_kv_heads, head_dim, dtype):
    one = cache_shape.engine_shape(9, 16, num_kv_heads, head_dim, dtype)
    several = cache_shape.engine_shape(9, 16, 4 * num_kv_heads, head_dim, dtype)
    if len(one) == len(several):
        assert several == (*one[:2], 4 * one[2], *one[3:])
    # And so do the pages on axis 0.
    more = cache_shape.engine_shape(18, 16, num_kv_heads, head_dim, dtype)
    assert more == (18, *one[1:])


def test_one_is_read_as_the_other_without_moving_bytes():
    shape = cache_shape.engine_shape(3, 8, 2, 128, "bfloat16")
    cache = jnp.arange(3 * 8 * 2 * 2 * 128, dtype=jnp.float32).reshape(shape)
    local = cache.reshape(cache_shape.kernel_shape(shape))
    assert (local.ravel() == cache.ravel()).all()
    # A page is one piece of memory in both.
    assert (local[1].ravel() == cache[1].ravel()).all()
    text = jax.jit(lambda x: x.reshape(local.shape)).lower(cache).as_text()
    assert "transpose" not in text


@pytest.mark.parametrize("size", [0, 12, 1024])
def test_pages_that_the_kernel_does_not_have_are_refused(size):
    with pytest.raises(ValueError, match="page_size"):
        cache_shape.engine_shape(9, size, 4, 128, "bfloat16")


def test_heads_that_it_does_not_have_are_refused():
    with pytest.raises(NotImplementedError, match="1024"):
        cache_shape.engine_shape(9, 16, 4, 1024, "bfloat16")

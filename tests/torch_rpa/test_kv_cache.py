"""The cache layout in torch agrees with the one of the JAX kernel."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import torch_rpa
from jax_kernels.contract import CacheGeometry
from jax_kernels.ragged_paged_attention import layout
from torch_rpa import kv_cache as kv_cache_lib

DTYPES = [
    (torch.float32, jnp.float32),
    (torch.bfloat16, jnp.bfloat16),
    (torch.float8_e4m3fn, jnp.float8_e4m3fn),
    (torch.float8_e5m2, jnp.float8_e5m2),
    (torch.int8, jnp.int8),
]


@pytest.mark.parametrize(("torch_dtype", "jax_dtype"), DTYPES, ids=lambda d: str(d))
@pytest.mark.parametrize("head_dim", [32, 64, 65, 96, 128, 192, 256, 512])
def test_shape_is_the_kernels(head_dim, torch_dtype, jax_dtype):
    for page_size in (8, 128, 512):
        for heads in (1, 3, 8):
            shape = torch_rpa.kv_cache_shape(5, page_size, heads, head_dim, torch_dtype)
            assert shape == tuple(
                layout.kv_cache_shape(5, page_size, heads, head_dim, jax_dtype)
            )
            geometry = kv_cache_lib.cache_geometry(shape, torch_dtype, head_dim)
            assert geometry == CacheGeometry(
                5, page_size, heads, head_dim, jnp.dtype(jax_dtype).name
            )


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256, 512])
def test_unpacked_view_is_the_kernels(head_dim):
    shape = torch_rpa.kv_cache_shape(3, 8, 2, head_dim, torch.int8)
    values = np.arange(np.prod(shape)).astype(np.int8).reshape(shape)
    ours = torch_rpa.unpack_kv_cache(torch.from_numpy(values), 2, head_dim)
    theirs = layout.unpack_kv_cache(jnp.asarray(values), 2, head_dim)
    assert ours.shape == (3, 2, 2, 8, head_dim)
    np.testing.assert_array_equal(ours.numpy(), np.asarray(theirs))


def test_writing_to_the_unpacked_view_writes_to_the_cache():
    kv_cache = torch_rpa.empty_kv_cache(2, 8, 1, 64, dtype=torch.float32)
    torch_rpa.unpack_kv_cache(kv_cache, 1, 64)[1, 1, 0, 3, 0] = 7.0
    # Page 1, head 0, slot 3, first lane of the value half.
    assert kv_cache[1, 0, 3, 0, 64] == 7.0
    assert kv_cache.count_nonzero() == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 8, 1, 64, torch.int8), ValueError, "num_pages must be"),
        ((1, 12, 1, 64, torch.int8), ValueError, "page_size must be"),
        ((1, 8, 1, 31, torch.int8), NotImplementedError, "head_dim 31 .* pad"),
        ((1, 8, 1, 64, torch.float16), NotImplementedError, "float16 .* use one of"),
    ],
)
def test_sizes_are_checked_by_the_contract(arguments, error, message):
    with pytest.raises(error, match=message):
        torch_rpa.kv_cache_shape(*arguments)


def test_unpack_with_other_heads_is_refused():
    kv_cache = torch_rpa.empty_kv_cache(2, 8, 2, 64)
    with pytest.raises(ValueError, match=r"kv_cache .* made for 3 key heads .* 2 key"):
        torch_rpa.unpack_kv_cache(kv_cache, 3, 64)

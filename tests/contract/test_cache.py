"""Rules of the geometry of the cache, and what is said of a cache that does not fit."""

import pytest

from jax_kernels.contract import CacheGeometry, cache_geometry

pytestmark = pytest.mark.versions

VALID = {
    "num_pages": 4,
    "page_size": 16,
    "num_kv_heads": 2,
    "head_dim": 64,
    "dtype_name": "bfloat16",
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_pages": 0}, ValueError, "num_pages must be at least 1, got 0"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be at least 1, got 0"),
        ({"page_size": 24}, ValueError, "page_size must be a power of two.*got 24"),
        ({"page_size": 4}, ValueError, "page_size must be.*from 8 to 512, got 4"),
        ({"page_size": 1024}, ValueError, "page_size .*got 1024"),
        ({"page_size": 0}, ValueError, "page_size .*got 0"),
        ({"head_dim": 513}, NotImplementedError, "head_dim 513 .*; use"),
        ({"head_dim": 16}, NotImplementedError, "head_dim 16 .*: pad"),
        ({"dtype_name": "float16"}, NotImplementedError, "dtype of float16 .*use one"),
    ],
)
def test_sizes_that_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        CacheGeometry(**(VALID | change))


@pytest.mark.parametrize("head_dim", [32, 64, 65, 128, 129, 256, 257, 512])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_sizes_are_read_off_the_shape(head_dim, dtype):
    geometry = CacheGeometry(5, 32, 3, head_dim, dtype)
    assert cache_geometry(geometry.shape, dtype, head_dim) == geometry
    assert cache_geometry(geometry.shape, dtype, head_dim, 3) == geometry


@pytest.mark.parametrize(
    ("shape", "heads", "head_dim", "message"),
    [
        # Made for 2 heads of up to 128, or 4 of up to 64.
        (
            (4, 4, 8, 2, 128),
            3,
            128,
            r"made for 3 key heads of head_dim 128, with shape \[num_pages, 2 \* 3, "
            r"page_size // 2, 2, 128\], got \[4, 4, 8, 2, 128\], which is made for 4 "
            "key heads of 32 to 64 or 2 key heads of 65 to 128 in pages of 16 tokens",
        ),
        (
            (4, 4, 8, 2, 128),
            4,
            256,
            "2, 256.*made for 4 key heads of 32 to 64",
        ),
        ((4, 4, 8, 2, 256), 2, 128, "which is made for 2 key heads of 129 to 256 in"),
        ((4, 4, 8, 2, 512), 2, 128, "which is made for 2 key heads of 385 to 512 in"),
        ((4, 4, 8, 2, 640), 2, 128, "which is the shape of no bfloat16 cache"),
        (
            (4, 3, 8, 2, 128),
            None,
            128,
            r"2 \* Hkv, .* made for 3 key heads of 32",
        ),
        ((4, 2, 16, 1, 128), 2, 64, "which is the shape of no bfloat16 cache"),
        ((4, 2, 16, 128), 2, 64, "which is the shape of no bfloat16 cache"),
        ((0, 2, 8, 2, 128), 2, 64, "which is the shape of no bfloat16 cache"),
        ((4, 2, 3, 2, 128), 2, 64, "page_size must be a power of two"),
    ],
)
def test_the_message_says_what_a_cache_is_made_for(shape, heads, head_dim, message):
    with pytest.raises(ValueError, match=message):
        cache_geometry(shape, "bfloat16", head_dim, heads)


def test_a_cache_of_another_dtype_names_those_that_are_supported():
    with pytest.raises(NotImplementedError, match=r"kv_cache of float16 .*int8"):
        cache_geometry((4, 2, 8, 2, 128), "float16", 64)

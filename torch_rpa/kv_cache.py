"""The paged key/value cache as a torch tensor: its shape, and views of it.

Its geometry is that of :mod:`jax_kernels.contract.cache`, where there is a drawing. In
row-major order it is ``[N, rows, page_size, lanes]``, which is what the code here works
with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jax_kernels.contract import cache as cache_rules
from jax_kernels.contract.cache import FUSED_VALUE_LANE, CacheGeometry
from torch_rpa.options import dtype_name, torch_dtype

CACHE_DTYPES = tuple(torch_dtype(name) for name in cache_rules.CACHE_DTYPES)


def kv_cache_shape(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> tuple[int, int, int, int, int]:
    """Returns the shape of a cache.

    Args:
        num_pages: Pages in the pool.
        page_size: Tokens in a page, a power of two from 8 to 512.
        num_kv_heads: Key heads; there are as many value heads.
        head_dim: From 32 to 512.
        dtype: bfloat16, float32, float8_e4m3fn, float8_e5m2 or int8.

    Example: ``kv_cache_shape(10, 16, 8, 128, torch.bfloat16)`` is
    ``(10, 16, 8, 2, 128)``.

    Raises:
        ValueError: A size is wrong.
        NotImplementedError: A head_dim or dtype that is not supported.
    """
    name = dtype_name(dtype)
    return CacheGeometry(num_pages, page_size, num_kv_heads, head_dim, name).shape


def empty_kv_cache(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Returns a new cache of zeros; see :func:`kv_cache_shape` for the arguments.

    On an XLA device call ``torch_xla.sync()`` once after all caches are made, so that
    making them does not become a part of the first step's program.
    """
    shape = kv_cache_shape(num_pages, page_size, num_kv_heads, head_dim, dtype)
    return torch.zeros(shape, dtype=dtype, device=device)


def unpack_kv_cache(
    kv_cache: torch.Tensor, num_kv_heads: int, head_dim: int
) -> torch.Tensor:
    """Returns a view of a cache as ``[N, 2, Hkv, page_size, D]``.

    Index 0 of the second axis holds keys, index 1 values. On CPU tensors writing to the
    view writes to the cache.

    Args:
        kv_cache: A contiguous cache.
        num_kv_heads: Key heads, ``Hkv``.
        head_dim: ``D``, elements of a key.
    """
    geometry = cache_geometry(kv_cache.shape, kv_cache.dtype, head_dim, num_kv_heads)
    pages, slots = geometry.num_pages, geometry.page_size
    if geometry.is_fused_kv:
        halves = kv_cache.view(pages, num_kv_heads, slots, 2, FUSED_VALUE_LANE)
        return halves.permute(0, 3, 1, 2, 4)[..., :head_dim]
    heads = kv_cache.view(pages, 2, num_kv_heads, slots, geometry.lanes)
    return heads[..., :head_dim]


def cache_geometry(
    shape: Sequence[int],
    dtype: torch.dtype,
    head_dim: int,
    num_kv_heads: int | None = None,
) -> CacheGeometry:
    """Reads the sizes of a cache off its shape, or says why it cannot be a cache."""
    return cache_rules.cache_geometry(
        tuple(shape), dtype_name(dtype), head_dim, num_kv_heads
    )

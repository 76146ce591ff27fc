"""The paged key/value cache as a torch tensor: its shape, and views of it.

With ``p = 4 // itemsize`` tokens packed in 32 bits, ``N`` pages and ``Hkv`` heads::

    head_dim > 64:   [N, 2 * Hkv, page_size // p, p, head_dim rounded up to 128]
                     key heads, then value heads
    head_dim <= 64:  [N, Hkv, page_size // p, p, 128]
                     lanes [0, D) key, lanes [64, 64 + D) value

In row-major order both are ``[N, rows, page_size, lanes]``, which is what the code here
works with. Lanes that belong to no key or value are zero in every written slot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

LANES = 128
CACHE_DTYPES = (
    torch.bfloat16,
    torch.float32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
)
QUANTIZED_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
MIN_HEAD_DIM, MAX_HEAD_DIM = 32, 256
MIN_PAGE_SIZE, MAX_PAGE_SIZE = 8, 512


@dataclasses.dataclass(frozen=True)
class CacheGeometry:
    """Sizes of a cache, read off its shape by :func:`cache_geometry`.

    Attributes:
        num_pages: Pages in the pool, N.
        page_size: Token slots in a page.
        num_kv_heads: Key heads, ``Hkv``.
        head_dim: ``D``, elements of a key.
    """

    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int

    @property
    def shares_lanes(self) -> bool:
        """Whether a key and its value lie in the same row of 128 lanes."""
        return self.head_dim <= LANES // 2

    @property
    def rows(self) -> int:
        """Rows of lanes for each token slot."""
        return self.num_kv_heads if self.shares_lanes else 2 * self.num_kv_heads

    @property
    def lanes(self) -> int:
        """Lanes of each row; 96 -> 128, 192 -> 256."""
        return -(-self.head_dim // LANES) * LANES


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
        head_dim: From 32 to 256.
        dtype: bfloat16, float32, float8_e4m3fn, float8_e5m2 or int8.

    Example: ``kv_cache_shape(10, 16, 8, 128, torch.bfloat16)`` is
    ``(10, 16, 8, 2, 128)``.
    """
    if dtype not in CACHE_DTYPES:
        raise ValueError(f"dtype must be one of {CACHE_DTYPES}, got {dtype}")
    if num_pages < 1:
        raise ValueError(f"num_pages must be at least 1, got {num_pages}")
    if num_kv_heads < 1:
        raise ValueError(f"num_kv_heads must be at least 1, got {num_kv_heads}")
    check_head_dim(head_dim)
    check_page_size(page_size)
    geometry = CacheGeometry(num_pages, page_size, num_kv_heads, head_dim)
    packing = 4 // dtype.itemsize
    return (num_pages, geometry.rows, page_size // packing, packing, geometry.lanes)


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
    geometry = cache_geometry(kv_cache.shape, kv_cache.dtype, head_dim)
    if geometry.num_kv_heads != num_kv_heads:
        raise ValueError(
            f"num_kv_heads must be {geometry.num_kv_heads} for a kv_cache of shape "
            f"{tuple(kv_cache.shape)} and head_dim {head_dim}, got {num_kv_heads}"
        )
    pages, slots = geometry.num_pages, geometry.page_size
    if geometry.shares_lanes:
        halves = kv_cache.view(pages, num_kv_heads, slots, 2, LANES // 2)
        return halves.permute(0, 3, 1, 2, 4)[..., :head_dim]
    heads = kv_cache.view(pages, 2, num_kv_heads, slots, geometry.lanes)
    return heads[..., :head_dim]


def cache_geometry(
    shape: Sequence[int], dtype: torch.dtype, head_dim: int
) -> CacheGeometry:
    """Reads the sizes of a cache off its shape, or says why it cannot be a cache."""
    if dtype not in CACHE_DTYPES:
        raise ValueError(f"kv_cache must have one of {CACHE_DTYPES}, got {dtype}")
    check_head_dim(head_dim)
    packing = 4 // dtype.itemsize
    shares_lanes = CacheGeometry(0, 0, 0, head_dim).shares_lanes
    lanes = CacheGeometry(0, 0, 0, head_dim).lanes
    rows = "Hkv" if shares_lanes else "2 * Hkv"
    fits = len(shape) == 5 and tuple(shape[3:]) == (packing, lanes)
    if fits and not shares_lanes:
        fits = shape[1] % 2 == 0
    if not fits or 0 in shape:
        raise ValueError(
            f"kv_cache of {dtype} for head_dim {head_dim} must have shape [num_pages, "
            f"{rows}, page_size // {packing}, {packing}, {lanes}], got {list(shape)}"
        )
    page_size = shape[2] * packing
    check_page_size(page_size)
    num_kv_heads = shape[1] if shares_lanes else shape[1] // 2
    return CacheGeometry(shape[0], page_size, num_kv_heads, head_dim)


def check_head_dim(head_dim: int) -> None:
    """Raises unless head_dim is in the supported range."""
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim must be from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {head_dim}"
        )


def check_page_size(page_size: int) -> None:
    """Raises unless page_size is a power of two in the supported range."""
    in_range = MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE
    if not in_range or page_size & (page_size - 1):
        raise ValueError(
            f"page_size must be a power of two from {MIN_PAGE_SIZE} to "
            f"{MAX_PAGE_SIZE}, got {page_size}"
        )

"""Where a key or value lives in the paged cache: packing, shapes, exact inverses.

The cache is one array whose last two axes are one packed row: ``p`` tokens of
``lanes`` numbers, 4 bytes deep (``p = 4 // itemsize``).

Split layout, ``head_dim > 64`` (here bfloat16, p = 2)::

    kv_cache[N, 2 * Hkv, page_size // p, p, lanes]      lanes = D rounded up to 128

    page n:  key head 0    [token 0 | token 1]  [token 2 | token 3]  ...
             ...
             key head Hkv-1
             value head 0  [token 0 | token 1]  [token 2 | token 3]  ...
             ...

Fused layout, ``head_dim <= 64``: one 128-lane row holds a key and its value::

    kv_cache[N, Hkv, page_size // p, p, 128]
    lanes    0 ....... D ... 64 ....... 64 + D ... 128
             key         0   value             0

Lanes that hold neither key nor value are zero in every live slot. Row-major, the
split layout is ``[N, 2, Hkv, page_size, lanes]``, so a reshape moves no byte.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jax_kernels.contract import cache as cache_rules
from jax_kernels.contract.cache import (
    FUSED_VALUE_LANE as FUSED_VALUE_LANE,
)
from jax_kernels.contract.cache import (
    LANES as LANES,
)
from jax_kernels.contract.cache import (
    align_to as align_to,
)


def dtype_packing(dtype: DTypeLike) -> int:
    """Number of elements in 4 bytes: 1 for float32, 2 for bfloat16, 4 for 8-bit."""
    itemsize = jnp.dtype(dtype).itemsize
    if itemsize not in (1, 2, 4):
        raise ValueError(f"dtype must have 1, 2 or 4 bytes per element, got {dtype}")
    return 4 // itemsize


@dataclasses.dataclass(frozen=True)
class CacheLayout(cache_rules.CacheGeometry):
    """The geometry of one paged cache, whose dtype is one of JAX.

    Attributes:
      num_pages: Pages in the cache, ``N``.
      page_size: Tokens per page, a power of two from 8 to 512.
      num_kv_heads: Key heads, ``Hkv``.
      head_dim: D, from 32 to 512.
      dtype_name: Name of the dtype; anything that names one is taken.
    """

    def __post_init__(self):
        name = jnp.dtype(self.dtype_name).name
        object.__setattr__(self, "dtype_name", name)
        super().__post_init__()

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the cache."""
        return jnp.dtype(self.dtype_name)

    @classmethod
    def of(cls, geometry: cache_rules.CacheGeometry) -> "CacheLayout":
        """The layout of the same sizes."""
        return cls(**vars(geometry))


def cache_layout(
    kv_cache_shape: tuple[int, ...],
    dtype: DTypeLike,
    num_kv_heads: int,
    head_dim: int,
) -> CacheLayout:
    """The layout of a given cache array.

    Args:
      kv_cache_shape: Shape of the cache, as made by ``kv_cache_shape``.
      dtype: Dtype of the cache.
      num_kv_heads: Key heads, ``Hkv``.
      head_dim: ``D``, elements of a key.

    Raises:
      ValueError: The shape is not that of a cache of this dtype, Hkv and D.
      NotImplementedError: A dtype or head_dim that is not supported.
    """
    return CacheLayout.of(
        cache_rules.cache_geometry(
            tuple(kv_cache_shape), jnp.dtype(dtype).name, head_dim, num_kv_heads
        )
    )


def kv_cache_shape(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: DTypeLike,
) -> tuple[int, int, int, int, int]:
    """Shape of the cache array; allocate it with zeros, or leave it uninitialised.

    Args:
      num_pages: Pages in the cache, ``N``.
      page_size: Tokens per page, a power of two from 8 to 512.
      num_kv_heads: Key heads, ``Hkv``.
      head_dim: D, from 32 to 512.
      dtype: float32, bfloat16, float8_e4m3fn, float8_e5m2 or int8.

    Example: ``kv_cache_shape(10, 128, 8, 128, jnp.bfloat16) == (10, 16, 64, 2, 128)``.

    Raises:
      ValueError: A size is wrong.
      NotImplementedError: A head_dim or dtype that is not supported.
    """
    name = jnp.dtype(dtype).name
    return CacheLayout(num_pages, page_size, num_kv_heads, head_dim, name).shape


def unpack_kv_cache(kv_cache: ArrayLike, num_kv_heads: int, head_dim: int) -> jax.Array:
    """The cache as pages of plain keys and values; inverse of ``pack_kv_cache``.

    Args:
      kv_cache: [N, heads, page_size // p, p, lanes].
      num_kv_heads: Key heads, ``Hkv``.
      head_dim: ``D``, elements of a key.

    Returns:
      [N, 2, Hkv, page_size, D]; index 0 of axis 1 holds keys, 1 values.
    """
    cache = jnp.asarray(kv_cache)
    layout = cache_layout(cache.shape, cache.dtype, num_kv_heads, head_dim)
    if layout.is_fused_kv:
        rows = cache.reshape(
            layout.num_pages, num_kv_heads, layout.page_size, 2, layout.value_lane
        )
        return jnp.moveaxis(rows, 3, 1)[..., :head_dim]
    pages = cache.reshape(
        layout.num_pages, 2, num_kv_heads, layout.page_size, layout.lanes
    )
    return pages[..., :head_dim]


def pack_kv_cache(pages: ArrayLike) -> jax.Array:
    """The cache that holds the given pages; lanes of padding are zero.

    Args:
      pages: [N, 2, Hkv, page_size, D]; index 0 of axis 1 holds keys, 1 values.

    Returns:
      [N, heads, page_size // p, p, lanes], of the dtype of ``pages``.
    """
    pages = jnp.asarray(pages)
    if pages.ndim != 5 or pages.shape[1] != 2:
        raise ValueError(
            "pages must have shape [num_pages, 2, num_kv_heads, page_size, head_dim], "
            f"got {pages.shape}"
        )
    num_pages, _, num_kv_heads, page_size, head_dim = pages.shape
    layout = CacheLayout(num_pages, page_size, num_kv_heads, head_dim, pages.dtype.name)
    width = layout.value_lane if layout.is_fused_kv else layout.lanes
    # As integers: on the CPU, JAX 0.12 makes zeros of subnormal numbers that it pads.
    words = lax.bitcast_convert_type(pages, f"uint{8 * layout.dtype.itemsize}")
    words = jnp.pad(words, [(0, 0)] * 4 + [(0, width - head_dim)])
    if layout.is_fused_kv:
        words = jnp.moveaxis(words, 1, 3)  # [N, Hkv, page_size, 2, 64]
    return lax.bitcast_convert_type(words.reshape(layout.shape), pages.dtype)

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
from jax.typing import ArrayLike, DTypeLike

LANES = 128
FUSED_VALUE_LANE = 64
MIN_HEAD_DIM, MAX_HEAD_DIM = 32, 256
MIN_PAGE_SIZE, MAX_PAGE_SIZE = 8, 512

CACHE_DTYPES = tuple(
    jnp.dtype(dtype)
    for dtype in (
        jnp.float32,
        jnp.bfloat16,
        jnp.float8_e4m3fn,
        jnp.float8_e5m2,
        jnp.int8,
    )
)


def align_to(value: int, multiple: int) -> int:
    """Rounds up to a multiple: ``align_to(96, 128) == 128``."""
    return -(-value // multiple) * multiple


def dtype_packing(dtype: DTypeLike) -> int:
    """Number of elements in 4 bytes: 1 for float32, 2 for bfloat16, 4 for 8-bit."""
    itemsize = jnp.dtype(dtype).itemsize
    if itemsize not in (1, 2, 4):
        raise ValueError(f"dtype: expected 1, 2 or 4 bytes per element, got {dtype}")
    return 4 // itemsize


def is_quantized(dtype: DTypeLike) -> bool:
    """Whether new keys and values are clipped to the range of ``dtype`` (8-bit)."""
    return jnp.dtype(dtype).itemsize == 1


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """The geometry of one paged cache; see the module docstring for the drawing.

    Attributes:
      num_pages: Pages in the cache, ``N``.
      page_size: Tokens per page, a power of two from 8 to 512.
      num_kv_heads: Key heads, ``Hkv``.
      head_dim: D, from 32 to 256.
      dtype: Dtype of the cache.
    """

    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: np.dtype

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if self.num_pages < 1:
            raise ValueError(f"num_pages: expected at least 1, got {self.num_pages}")
        if self.num_kv_heads < 1:
            raise ValueError(
                f"num_kv_heads: expected at least 1, got {self.num_kv_heads}"
            )
        is_power_of_two = self.page_size > 0 and self.page_size.bit_count() == 1
        if not (is_power_of_two and MIN_PAGE_SIZE <= self.page_size <= MAX_PAGE_SIZE):
            raise ValueError(
                f"page_size: expected a power of two from {MIN_PAGE_SIZE} to "
                f"{MAX_PAGE_SIZE}, got {self.page_size}"
            )
        check_head_dim(self.head_dim)
        if self.dtype not in CACHE_DTYPES:
            raise NotImplementedError(
                f"kv_cache: dtype {self.dtype} is not supported; use one of "
                f"{', '.join(dtype.name for dtype in CACHE_DTYPES)}"
            )

    @property
    def packing(self) -> int:
        """Tokens per packed row (p)."""
        return dtype_packing(self.dtype)

    @property
    def is_fused_kv(self) -> bool:
        """Whether a key and its value share one 128-lane row (head_dim <= 64)."""
        return self.head_dim <= FUSED_VALUE_LANE

    @property
    def lanes(self) -> int:
        """Length of the last axis: head_dim rounded up to 128."""
        return align_to(self.head_dim, LANES)

    @property
    def value_lane(self) -> int:
        """First lane of a value within its row."""
        return FUSED_VALUE_LANE if self.is_fused_kv else 0

    @property
    def heads_per_page(self) -> int:
        """Length of axis 1: Hkv when fused, otherwise 2 * Hkv (keys, then values)."""
        return self.num_kv_heads * (1 if self.is_fused_kv else 2)

    @property
    def rows_per_page(self) -> int:
        """Packed rows per head of a page."""
        return self.page_size // self.packing

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Shape of the cache array."""
        return (
            self.num_pages,
            self.heads_per_page,
            self.rows_per_page,
            self.packing,
            self.lanes,
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, padding lanes included."""
        return self.heads_per_page * self.page_size * self.lanes * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all heads, padding lanes included."""
        return self.page_bytes // self.page_size


def check_head_dim(head_dim: int) -> None:
    """Raises unless ``head_dim`` is one that the cache and the kernel support."""
    if head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"head_dim: {head_dim} is larger than {MAX_HEAD_DIM}, which is the most "
            "the cache layout holds; use a model with smaller heads or dense attention"
        )
    if head_dim < MIN_HEAD_DIM:
        raise NotImplementedError(
            f"head_dim: {head_dim} is smaller than {MIN_HEAD_DIM}; pad queries, keys "
            f"and values with zeros to {MIN_HEAD_DIM} and slice the output"
        )


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
    """
    shape = tuple(kv_cache_shape)
    if len(shape) != 5:
        raise ValueError(
            "kv_cache: expected 5 axes [num_pages, heads, page_size // packing, "
            f"packing, lanes], got shape {shape}"
        )
    layout = CacheLayout(
        num_pages=shape[0],
        page_size=shape[2] * shape[3],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=jnp.dtype(dtype),
    )
    if layout.shape != shape:
        raise ValueError(
            f"kv_cache: expected shape {layout.shape} for {num_kv_heads=}, {head_dim=} "
            f"and dtype {layout.dtype}, got {shape}"
        )
    return layout


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
      head_dim: D, from 32 to 256.
      dtype: float32, bfloat16, float8_e4m3fn, float8_e5m2 or int8.

    Example: ``kv_cache_shape(10, 128, 8, 128, jnp.bfloat16) == (10, 16, 64, 2, 128)``.
    """
    return CacheLayout(
        num_pages, page_size, num_kv_heads, head_dim, jnp.dtype(dtype)
    ).shape


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
            "pages: expected shape [num_pages, 2, num_kv_heads, page_size, head_dim], "
            f"got {pages.shape}"
        )
    num_pages, _, num_kv_heads, page_size, head_dim = pages.shape
    layout = CacheLayout(num_pages, page_size, num_kv_heads, head_dim, pages.dtype)
    width = layout.value_lane if layout.is_fused_kv else layout.lanes
    pages = jnp.pad(pages, [(0, 0)] * 4 + [(0, width - head_dim)])
    if layout.is_fused_kv:
        pages = jnp.moveaxis(pages, 1, 3)  # [N, Hkv, page_size, 2, 64]
    return pages.reshape(layout.shape)

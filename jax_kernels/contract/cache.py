"""The geometry of the paged cache, on plain ints and names of dtypes.

With ``p = 4 // itemsize`` tokens in each packed row of 32-bit words::

    head_dim > 64:   [N, 2 * Hkv, page_size // p, p, head_dim rounded up to 128]
                     key heads, then value heads
    head_dim <= 64:  [N, Hkv, page_size // p, p, 128]
                     lanes [0, D) key, lanes [64, 64 + D) value

Read row-major both are ``[N, heads_per_page, page_size, lanes]``. Lanes that belong to
no key or value are zero in every written slot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

LANES = 128
FUSED_VALUE_LANE = 64
MIN_HEAD_DIM, MAX_HEAD_DIM = 32, 512
_SEPARATE_LANES = range(LANES, MAX_HEAD_DIM + 1, LANES)
MIN_PAGE_SIZE, MAX_PAGE_SIZE = 8, 512

ITEMSIZES = {
    "bfloat16": 2,
    "float32": 4,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
}
CACHE_DTYPES = tuple(ITEMSIZES)
QUANTIZED_DTYPES = tuple(name for name, size in ITEMSIZES.items() if size == 1)


def align_to(value: int, multiple: int) -> int:
    """Rounds up to a multiple: ``align_to(96, 128) == 128``."""
    return -(-value // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class CacheGeometry:
    """Sizes of one paged cache; see the module docstring for the drawing.

    Attributes:
      num_pages: Pages in the pool, N.
      page_size: Tokens per page, a power of two from 8 to 512.
      num_kv_heads: Key heads, Hkv; there are as many value heads.
      head_dim: D, from 32 to 512.
      dtype_name: One of ``CACHE_DTYPES``.

    Raises:
      ValueError: A size is wrong.
      NotImplementedError: A head_dim or dtype that is not supported.
    """

    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype_name: str

    def __post_init__(self) -> None:
        check_dtype(self.dtype_name)
        check_head_dim(self.head_dim)
        check_page_size(self.page_size)
        for name in ("num_pages", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZES[self.dtype_name]

    @property
    def packing(self) -> int:
        """Tokens per packed row (p)."""
        return 4 // self.itemsize

    @property
    def is_quantized(self) -> bool:
        """Whether new keys and values are clipped to the range of an 8-bit dtype."""
        return self.dtype_name in QUANTIZED_DTYPES

    @property
    def is_fused_kv(self) -> bool:
        """Whether a key and its value share one 128-lane row (head_dim <= 64)."""
        return is_fused(self.head_dim)

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
        return self.heads_per_page * self.page_size * self.lanes * self.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all heads, padding lanes included."""
        return self.page_bytes // self.page_size


def cache_geometry(
    shape: Sequence[int],
    dtype_name: str,
    head_dim: int,
    num_kv_heads: int | None = None,
) -> CacheGeometry:
    """Reads the sizes of a cache off its shape.

    Args:
      shape: Shape of the cache array.
      dtype_name: Its dtype.
      head_dim: D, of the queries.
      num_kv_heads: Hkv that the cache must have, or None for whatever it has.

    Raises:
      ValueError: It is no cache for this head_dim and these heads. The message says
        what it is made for, as far as its shape tells.
    """
    check_dtype(dtype_name, "kv_cache")
    check_head_dim(head_dim)
    packing = 4 // ITEMSIZES[dtype_name]
    lanes = align_to(head_dim, LANES)
    arrays = 1 if is_fused(head_dim) else 2
    fits = (
        len(shape) == 5
        and 0 not in shape
        and (shape[3], shape[4]) == (packing, lanes)
        and shape[1] % arrays == 0
        and (num_kv_heads is None or shape[1] == arrays * num_kv_heads)
    )
    if not fits:
        heads = "Hkv" if num_kv_heads is None else str(num_kv_heads)
        rows = heads if is_fused(head_dim) else f"2 * {heads}"
        needed = "" if num_kv_heads is None else f"{num_kv_heads} key heads of "
        raise ValueError(
            f"kv_cache of {dtype_name} must be made for {needed}head_dim {head_dim}, "
            f"with shape [num_pages, {rows}, page_size // {packing}, {packing}, "
            f"{lanes}], got {list(shape)}, {made_for(shape, dtype_name)}"
        )
    page_size = shape[2] * packing
    check_page_size(page_size)
    return CacheGeometry(shape[0], page_size, shape[1] // arrays, head_dim, dtype_name)


def made_for(shape: Sequence[int], dtype_name: str) -> str:
    """What a cache of this shape is made for, in words that end an error message."""
    packing = 4 // ITEMSIZES[dtype_name]
    is_cache = len(shape) == 5 and 0 not in shape and shape[3] == packing
    readings = []
    if is_cache and shape[4] == LANES:
        readings.append(f"{shape[1]} key heads of 32 to 64")
    if is_cache and shape[4] in _SEPARATE_LANES and shape[1] % 2 == 0:
        least = max(shape[4] - LANES, FUSED_VALUE_LANE) + 1
        sizes = f"{least} to {shape[4]}"
        readings.append(f"{shape[1] // 2} key heads of {sizes}")
    if not readings:
        return f"which is the shape of no {dtype_name} cache"
    page_size = shape[2] * packing
    return f"which is made for {' or '.join(readings)} in pages of {page_size} tokens"


def is_fused(head_dim: int) -> bool:
    """Whether a key and its value share one row of 128 lanes."""
    return head_dim <= FUSED_VALUE_LANE


def check_dtype(dtype_name: str, argument: str = "dtype") -> None:
    """Raises unless a cache may have the dtype."""
    if dtype_name not in CACHE_DTYPES:
        raise NotImplementedError(
            f"{argument} of {dtype_name} is not supported: use one of "
            f"{', '.join(CACHE_DTYPES)}"
        )


def check_head_dim(head_dim: int) -> None:
    """Raises unless head_dim is in the supported range."""
    if head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"head_dim {head_dim} is not supported: the cache holds {MAX_HEAD_DIM} at "
            "most; use a model with smaller heads or dense attention"
        )
    if head_dim < MIN_HEAD_DIM:
        raise NotImplementedError(
            f"head_dim {head_dim} is not supported: pad q, k and v with zeros to "
            f"{MIN_HEAD_DIM} and slice the output"
        )


def check_page_size(page_size: int, argument: str = "page_size") -> None:
    """Raises unless page_size is a power of two in the supported range."""
    in_range = MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE
    if not in_range or page_size & (page_size - 1):
        raise ValueError(
            f"{argument} must be a power of two from {MIN_PAGE_SIZE} to "
            f"{MAX_PAGE_SIZE}, got {page_size}"
        )

"""The cache in a shape that tpu-inference can shard by heads and cut by pages.

The engine multiplies axis 2 by the number of shards, and takes axis 1 for the tokens of
a page. The kernel's cache is ``[N, heads, page_size / p, p, lanes]``, and its bytes are
those of ``[N, page_size, heads / p, p, lanes]``: the last two axes are one unit of
memory, and there are as many of them. So the one is read as the other for nothing,
where ``p`` divides the heads of a shard. Where it does not, pages are axis 0 alone.
"""

from __future__ import annotations

from jax_kernels.contract import cache

# The engine asks for heads of 64 or of a multiple of 128, and pads others.
_NARROW, _PADDED = 64, 128


def padded_head_dim(head_dim: int) -> int:
    """Returns the head_dim that the cache is made for.

    The layout is the same for all of 65 to 128, but not for less than 64.
    """
    return _PADDED if head_dim < _NARROW else head_dim


def engine_shape(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype_name: str
) -> tuple[int, ...]:
    """Returns the shape of the cache of one shard.

    Args:
        num_pages: Pages of the pool.
        page_size: Tokens of a page, a power of two from 8 to 512.
        num_kv_heads: Key heads of the shard.
        head_dim: As the engine pads it.
        dtype_name: Of the cache, such as ``"float8_e4m3fn"``.

    Returns:
        ``[N, page_size, heads / p, p, lanes]``, or ``[N, 1, heads, page_size / p, p,
        lanes]`` where ``p`` does not divide the heads.

    Raises:
        ValueError: A size is wrong.
        NotImplementedError: A head_dim or dtype that the kernel does not have.
    """
    geometry = cache.CacheGeometry(
        num_pages, page_size, num_kv_heads, padded_head_dim(head_dim), dtype_name
    )
    num_pages, heads, rows, packing, lanes = geometry.shape
    if heads % packing:
        return num_pages, 1, heads, rows, packing, lanes
    return num_pages, page_size, heads // packing, packing, lanes


def has_pages_on_axis_1(shape: tuple[int, ...]) -> bool:
    """Whether axis 1 of a shape of ``engine_shape`` is the tokens of a page."""
    return len(shape) == 5


def kernel_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the kernel's shape of a cache in a shape of ``engine_shape``."""
    if not has_pages_on_axis_1(shape):
        return shape[0], *shape[2:]
    num_pages, page_size, heads, packing, lanes = shape
    return num_pages, heads * packing, page_size // packing, packing, lanes

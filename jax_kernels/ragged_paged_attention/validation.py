"""What the arguments of ragged paged attention must be.

``validate_static`` looks at shapes, dtypes and Python values, so it works under a
trace. ``validate_dynamic`` looks at lengths and page ids, so it needs real numbers
and is meant for tests and debugging.
"""

import dataclasses
import math
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_kernels.ragged_paged_attention import layout


class ShapedArray(Protocol):
    """Anything with a shape and a dtype: an array, a tracer, a ShapeDtypeStruct."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...


_QUERY_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static sizes of one call.

    Attributes:
      num_tokens: T, query tokens, padding included.
      num_sequences: S, sequences, padding included.
      pages_per_sequence: P.
      num_q_heads: Hq.
      q_dtype: Dtype of queries, keys and values.
      out_dtype: Dtype of the output.
      cache: Geometry of the cache, which holds Hkv, D and the page size.
    """

    num_tokens: int
    num_sequences: int
    pages_per_sequence: int
    num_q_heads: int
    q_dtype: np.dtype
    out_dtype: np.dtype
    cache: layout.CacheLayout

    @property
    def max_kv_len(self) -> int:
        """Tokens that the pages of one sequence hold."""
        return self.pages_per_sequence * self.cache.page_size

    @property
    def num_kv_heads(self) -> int:
        """Hkv."""
        return self.cache.num_kv_heads

    @property
    def num_q_heads_per_kv_head(self) -> int:
        """G = Hq // Hkv."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def head_dim(self) -> int:
        """D."""
        return self.cache.head_dim


def validate_static(
    queries: ShapedArray,
    keys: ShapedArray | None,
    values: ShapedArray | None,
    kv_cache: ShapedArray,
    kv_lens: ShapedArray,
    page_indices: ShapedArray,
    cu_q_lens: ShapedArray,
    distribution: ShapedArray,
    sinks: ShapedArray | None = None,
    *,
    sm_scale: float = 1.0,
    causal: bool = True,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    update_kv_cache: bool = True,
    chunk_prefill_size: int | None = None,
    out_dtype: DTypeLike | None = None,
) -> Problem:
    """Checks everything that is known while tracing, and derives the static sizes.

    Takes the arguments of ``ragged_paged_attention``; arrays may be
    ``jax.ShapeDtypeStruct``.

    Raises:
      ValueError: An argument is wrong; the message has its name, what was expected
        and what was given.
      NotImplementedError: An argument is meaningful but not supported; the message
        names the alternative.
    """
    _check_bool("causal", causal)
    _check_bool("update_kv_cache", update_kv_cache)
    _check_positive("sm_scale", sm_scale)
    for name, value in {
        "soft_cap": soft_cap,
        "q_scale": q_scale,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }.items():
        if value is not None:
            _check_positive(name, value)
    for name, value in {
        "sliding_window": sliding_window,
        "chunk_prefill_size": chunk_prefill_size,
    }.items():
        if value is not None:
            _check_positive_int(name, value)

    num_tokens, num_q_heads, head_dim, q_dtype = _check_queries(queries)
    num_kv_heads = _check_keys_and_values(
        queries, keys, values, kv_cache, update_kv_cache
    )
    if num_q_heads % num_kv_heads:
        raise ValueError(
            "queries: expected a number of heads that is a multiple of "
            f"{num_kv_heads=}, got {num_q_heads=}"
        )
    cache = layout.cache_layout(kv_cache.shape, kv_cache.dtype, num_kv_heads, head_dim)
    if q_scale is not None and not layout.is_quantized(cache.dtype):
        raise NotImplementedError(
            f"q_scale: queries are not quantised to a {cache.dtype} cache; pass "
            "q_scale=None, or use a float8 or int8 cache"
        )
    num_sequences, pages_per_sequence = _check_metadata(
        kv_lens, page_indices, cu_q_lens, distribution
    )
    if sinks is not None:
        _check_array("sinks", sinks, (num_q_heads,), jnp.float32)
    return Problem(
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        pages_per_sequence=pages_per_sequence,
        num_q_heads=num_q_heads,
        q_dtype=q_dtype,
        out_dtype=_check_out_dtype(out_dtype, q_dtype),
        cache=cache,
    )


def _check_queries(queries: ShapedArray) -> tuple[int, int, int, np.dtype]:
    if len(queries.shape) != 3 or 0 in queries.shape:
        raise ValueError(
            "queries: expected a non-empty [num_tokens, num_q_heads, head_dim], got "
            f"shape {tuple(queries.shape)}"
        )
    dtype = jnp.dtype(queries.dtype)
    if dtype not in _QUERY_DTYPES:
        raise NotImplementedError(
            f"queries: dtype {dtype} is not supported; cast to bfloat16 or float32"
        )
    layout.check_head_dim(queries.shape[2])
    return *queries.shape, dtype


def _check_keys_and_values(
    queries: ShapedArray,
    keys: ShapedArray | None,
    values: ShapedArray | None,
    kv_cache: ShapedArray,
    update_kv_cache: bool,
) -> int:
    """Returns Hkv, from the keys when there are any, otherwise from the cache."""
    num_tokens, _, head_dim = queries.shape
    if (keys is None) != (values is None):
        given, missing = ("keys", "values") if values is None else ("values", "keys")
        raise ValueError(
            f"{missing}: expected an array because {given} is one, got None"
        )
    if keys is None or values is None:
        if update_kv_cache:
            raise NotImplementedError(
                "keys, values: both are None but update_kv_cache is True; pass them, "
                "or pass update_kv_cache=False to read everything from the cache"
            )
        return _num_kv_heads_of_cache(kv_cache, head_dim)
    if len(keys.shape) != 3 or keys.shape[1] < 1:
        raise ValueError(
            "keys: expected shape [num_tokens, num_kv_heads, head_dim], got "
            f"{tuple(keys.shape)}"
        )
    num_kv_heads = keys.shape[1]
    for name, array in {"keys": keys, "values": values}.items():
        shape = (num_tokens, num_kv_heads, head_dim)
        _check_array(name, array, shape, queries.dtype)
    return num_kv_heads


def _num_kv_heads_of_cache(kv_cache: ShapedArray, head_dim: int) -> int:
    heads_per_kv_head = 1 if head_dim <= layout.FUSED_VALUE_LANE else 2
    shape = tuple(kv_cache.shape)
    if len(shape) != 5 or shape[1] < 1 or shape[1] % heads_per_kv_head:
        raise ValueError(
            f"kv_cache: expected 5 axes with a multiple of {heads_per_kv_head} on "
            f"axis 1 for {head_dim=}, got shape {shape}"
        )
    return shape[1] // heads_per_kv_head


def _check_metadata(
    kv_lens: ShapedArray,
    page_indices: ShapedArray,
    cu_q_lens: ShapedArray,
    distribution: ShapedArray,
) -> tuple[int, int]:
    if len(kv_lens.shape) != 1 or kv_lens.shape[0] < 1:
        raise ValueError(
            "kv_lens: expected shape [num_sequences], at least 1, got "
            f"{tuple(kv_lens.shape)}"
        )
    num_sequences = kv_lens.shape[0]
    _check_array("kv_lens", kv_lens, (num_sequences,), jnp.int32)
    _check_array("cu_q_lens", cu_q_lens, (num_sequences + 1,), jnp.int32)
    _check_array("distribution", distribution, (3,), jnp.int32)
    num_pages = page_indices.shape[0] if len(page_indices.shape) == 1 else 0
    if num_pages < 1 or num_pages % num_sequences:
        raise ValueError(
            "page_indices: expected a flat [num_sequences * pages_per_sequence] with "
            f"{num_sequences=}, got shape {tuple(page_indices.shape)}"
        )
    _check_array("page_indices", page_indices, (num_pages,), jnp.int32)
    return num_sequences, num_pages // num_sequences


def _check_out_dtype(out_dtype: DTypeLike | None, q_dtype: np.dtype) -> np.dtype:
    if out_dtype is None:
        return q_dtype
    dtype = jnp.dtype(out_dtype)
    if dtype not in _QUERY_DTYPES:
        raise NotImplementedError(
            f"out_dtype: {dtype} is not supported; use bfloat16 or float32 and cast "
            "the output"
        )
    return dtype


def _check_array(
    name: str, array: ShapedArray, shape: tuple[int, ...], dtype: DTypeLike
) -> None:
    if tuple(array.shape) != shape:
        raise ValueError(
            f"{name}: expected shape {shape}, got shape {tuple(array.shape)}"
        )
    if jnp.dtype(array.dtype) != jnp.dtype(dtype):
        raise ValueError(
            f"{name}: expected dtype {jnp.dtype(dtype)}, got dtype "
            f"{jnp.dtype(array.dtype)}"
        )


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value) and value > 0:
            return
    raise ValueError(f"{name}: expected a positive finite Python float, got {value!r}")


def _check_positive_int(name: str, value: object) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return
    raise ValueError(f"{name}: expected a positive Python int, got {value!r}")


def validate_dynamic(
    kv_lens: np.ndarray,
    page_indices: np.ndarray,
    cu_q_lens: np.ndarray,
    distribution: np.ndarray,
    *,
    page_size: int,
    num_pages: int,
    num_tokens: int,
    chunk_prefill_size: int | None = None,
    update_kv_cache: bool = True,
) -> None:
    """Checks the values of the metadata of one step.

    Only the ``distribution[2]`` live sequences are looked at. Sequences without
    queries take no part, so their pages may be anything.

    Args:
      kv_lens: i32[S].
      page_indices: i32[S * P].
      cu_q_lens: i32[S + 1].
      distribution: i32[3].
      page_size: Tokens per page.
      num_pages: N.
      num_tokens: T.
      chunk_prefill_size: Query length of the prefill range, when it is fixed.
      update_kv_cache: Whether new tokens are written; otherwise slots may be shared.

    Raises:
      ValueError: The first thing found wrong, with the sequence it is wrong in.
    """
    kv_lens = np.asarray(kv_lens, np.int64)
    cu_q_lens = np.asarray(cu_q_lens, np.int64)
    num_sequences = len(kv_lens)
    i, j, k = (int(end) for end in np.asarray(distribution))
    if not 0 <= i <= j <= k <= num_sequences:
        raise ValueError(
            f"distribution: expected 0 <= i <= j <= k <= {num_sequences=}, got "
            f"{(i, j, k)}"
        )
    q_lens = np.diff(cu_q_lens[: k + 1])
    _check_q_lens(cu_q_lens[: k + 1], q_lens, num_tokens)
    _check_phases(q_lens, i, j, chunk_prefill_size)
    page_table = np.asarray(page_indices, np.int64).reshape(num_sequences, -1)
    _check_kv_lens(kv_lens[:k], q_lens, page_table.shape[1] * page_size)
    _check_pages(kv_lens[:k], q_lens, page_table[:k], page_size, num_pages)
    if update_kv_cache:
        _check_written_slots(kv_lens[:k], q_lens, page_table[:k], page_size, num_pages)


def _check_q_lens(cu_q_lens: np.ndarray, q_lens: np.ndarray, num_tokens: int) -> None:
    if cu_q_lens[0] != 0:
        raise ValueError(f"cu_q_lens: expected to start with 0, got {cu_q_lens[0]}")
    for s in np.flatnonzero(q_lens < 0)[:1]:
        raise ValueError(
            f"cu_q_lens: expected no decrease, got {cu_q_lens[s]}, {cu_q_lens[s + 1]} "
            f"for sequence {s}"
        )
    if cu_q_lens[-1] > num_tokens:
        raise ValueError(
            f"cu_q_lens: expected at most {num_tokens=} query tokens, got "
            f"{cu_q_lens[-1]}"
        )


def _check_phases(
    q_lens: np.ndarray, i: int, j: int, chunk_prefill_size: int | None
) -> None:
    for s in np.flatnonzero(q_lens[:i] != 1)[:1]:
        raise ValueError(
            f"cu_q_lens: expected 1 query token in decode sequence {s}, got {q_lens[s]}"
        )
    if chunk_prefill_size is None:
        return
    for s in i + np.flatnonzero(q_lens[i:j] != chunk_prefill_size)[:1]:
        raise ValueError(
            f"cu_q_lens: expected {chunk_prefill_size=} query tokens in prefill "
            f"sequence {s}, got {q_lens[s]}"
        )


def _check_kv_lens(kv_lens: np.ndarray, q_lens: np.ndarray, max_kv_len: int) -> None:
    for s in np.flatnonzero((kv_lens < 0) | (kv_lens > max_kv_len))[:1]:
        raise ValueError(
            f"kv_lens: expected 0 to pages_per_sequence * page_size = {max_kv_len}, "
            f"got {kv_lens[s]} for sequence {s}"
        )
    for s in np.flatnonzero(q_lens > kv_lens)[:1]:
        raise ValueError(
            f"kv_lens: expected at least the {q_lens[s]} new tokens of sequence {s}, "
            f"got {kv_lens[s]}"
        )


def _check_pages(
    kv_lens: np.ndarray,
    q_lens: np.ndarray,
    page_table: np.ndarray,
    page_size: int,
    num_pages: int,
) -> None:
    column = np.arange(page_table.shape[1])
    is_live = (column * page_size < kv_lens[:, None]) & (q_lens > 0)[:, None]
    is_wrong = is_live & ((page_table < 0) | (page_table >= num_pages))
    for s, p in np.argwhere(is_wrong)[:1]:
        raise ValueError(
            f"page_indices: expected page ids from 0 to {num_pages - 1}, got "
            f"{page_table[s, p]} for page {p} of sequence {s}"
        )


def _check_written_slots(
    kv_lens: np.ndarray,
    q_lens: np.ndarray,
    page_table: np.ndarray,
    page_size: int,
    num_pages: int,
) -> None:
    """Raises when a slot that one sequence writes is live anywhere else."""
    slots, is_written, owners = [], [], []
    for s in np.flatnonzero(q_lens > 0):
        position = np.arange(kv_lens[s])
        page = page_table[s, position // page_size]
        slots.append(page * page_size + position % page_size)
        is_written.append(position >= kv_lens[s] - q_lens[s])
        owners.append(np.full(len(position), s))
    if not slots:
        return
    slot, written, owner = map(np.concatenate, (slots, is_written, owners))
    num_uses = np.bincount(slot, minlength=num_pages * page_size)
    for index in np.flatnonzero(written & (num_uses[slot] > 1))[:1]:
        users = sorted(set(owner[slot == slot[index]].tolist()))
        raise ValueError(
            "page_indices: expected a slot that is written to be used once, got slot "
            f"{slot[index] % page_size} of page {slot[index] // page_size} used more "
            f"than once by sequences {users}"
        )

"""Ragged batches in numpy, with everything that must not matter made hostile.

Page tables are random permutations with holes; entries past the live pages, and all
metadata past the live sequences, are garbage; dead cache slots hold NaN and Inf (random
bytes for int8); padding rows of queries, keys and values are NaN.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from tests.support import oracle

_INT_MAX = np.iinfo(np.int32).max
_GARBAGE = np.array([-1, _INT_MAX, np.iinfo(np.int32).min, 123_456_789], np.int32)

# Bytes, little endian, of numbers that must never be read. NaNs are canonical: other
# payloads do not survive the float conversions of a CPU.
_POISON_BITS = {
    "float32": [0x7FC00000, 0x7F800000, 0xFF800000],
    "bfloat16": [0x7FC0, 0x7F80, 0xFF80],
    "float8_e4m3fn": [0x7F],
    "float8_e5m2": [0x7E, 0x7C, 0xFC],
}


@dataclasses.dataclass(frozen=True)
class RaggedBatch:
    """The arrays of one call, in numpy, and what is needed to describe them."""

    queries: np.ndarray  # [T, Hq, D]
    keys: np.ndarray  # [T, Hkv, D]
    values: np.ndarray  # [T, Hkv, D]
    kv_cache: np.ndarray
    kv_lens: np.ndarray  # i32[S]
    page_indices: np.ndarray  # i32[S * P]
    cu_q_lens: np.ndarray  # i32[S + 1]
    distribution: np.ndarray  # i32[3]
    sinks: np.ndarray | None  # f32[Hq]
    page_size: int

    @property
    def arguments(self) -> tuple:
        """The positional arguments of the operator; a fresh copy of the cache."""
        return (
            self.queries,
            self.keys,
            self.values,
            self.kv_cache.copy(),
            self.kv_lens,
            self.page_indices,
            self.cu_q_lens,
            self.distribution,
            self.sinks,
        )

    @property
    def jax_arguments(self) -> tuple:
        """The same as JAX arrays."""
        return tuple(x if x is None else jnp.asarray(x) for x in self.arguments)

    @property
    def num_live_tokens(self) -> int:
        """Rows of queries that belong to a sequence."""
        return int(self.cu_q_lens[self.distribution[2]])

    @property
    def page_table(self) -> np.ndarray:
        """The page table [S, P]."""
        return self.page_indices.reshape(len(self.kv_lens), -1)

    def replace(self, **changes) -> "RaggedBatch":
        """A batch that differs in some fields."""
        return dataclasses.replace(self, **changes)


def make_ragged_batch(
    sequences: Sequence[tuple[int, int]],
    *,
    num_q_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    q_dtype="float32",
    cache_dtype=None,
    distribution: tuple[int, int, int] | None = None,
    max_sequences: int | None = None,
    pages_per_sequence: int | None = None,
    num_tokens: int | None = None,
    num_spare_pages: int = 3,
    shared_prefix_pages: int = 0,
    with_sinks: bool = False,
    k_scale: oracle.Scale = None,
    v_scale: oracle.Scale = None,
    cache_holds_new_tokens: bool = False,
    new_tokens_have_slots: bool = True,
    nan_payloads: bool = False,
    seed: int = 0,
) -> RaggedBatch:
    """Makes a batch; the same arguments make the same batch.

    Args:
      sequences: (q_len, kv_len) of each live sequence, in order. (0, n) and (n, 0)
        are allowed: such a sequence has no pages.
      num_q_heads: Hq.
      num_kv_heads: Hkv.
      head_dim: D.
      page_size: Tokens per page.
      q_dtype: Dtype of queries, keys and values.
      cache_dtype: Dtype of the cache, that of the queries by default.
      distribution: (i, j, k). By default the leading sequences with one query are
        decodes and the others are mixed.
      max_sequences: S; by default two more than there are.
      pages_per_sequence: P; by default one more than the longest sequence needs.
      num_tokens: T; by default five more than there are.
      num_spare_pages: Pages that belong to no sequence.
      shared_prefix_pages: Leading pages shared by all sequences that have them full
        before their new tokens.
      with_sinks: Whether to make sinks.
      k_scale: Scale with which the old keys are stored.
      v_scale: Scale with which the old values are stored.
      cache_holds_new_tokens: Whether the new tokens are in the cache already, as
        ``update_kv_cache=False`` needs. Otherwise their slots are poisoned.
      new_tokens_have_slots: Whether the page table has room for them.
      nan_payloads: Whether dead slots hold NaNs of every payload.
      seed: Seed of everything random.
    """
    rng = np.random.default_rng(seed)
    q_dtype = jnp.dtype(q_dtype)
    cache_dtype = q_dtype if cache_dtype is None else jnp.dtype(cache_dtype)
    num_live = len(sequences)
    q_lens = np.array([q for q, _ in sequences], np.int64)
    num_sequences = max(num_live + 2 if max_sequences is None else max_sequences, 1)
    total = int(q_lens.sum())
    num_tokens = max(total + 5 if num_tokens is None else num_tokens, 1)
    if distribution is None:
        is_longer = q_lens != 1
        num_decodes = int(is_longer.argmax()) if is_longer.any() else num_live
        distribution = (num_decodes, num_decodes, num_live)
    assert distribution[2] == num_live <= num_sequences and total <= num_tokens

    page_table, num_pages = _page_table(
        rng,
        sequences,
        new_tokens_have_slots,
        num_sequences,
        page_size,
        pages_per_sequence,
        num_spare_pages,
        shared_prefix_pages,
    )
    kv_lens = rng.choice(np.append(_GARBAGE, 7), num_sequences).astype(np.int32)
    kv_lens[:num_live] = [kv for _, kv in sequences]
    cu_q_lens = rng.choice(np.append(_GARBAGE, 1), num_sequences + 1).astype(np.int32)
    cu_q_lens[: num_live + 1] = np.concatenate([[0], np.cumsum(q_lens)])

    normal = functools.partial(_normal_rows, rng, total, num_tokens, head_dim, q_dtype)
    queries, keys, values = map(normal, (num_q_heads, num_kv_heads, num_kv_heads))
    batch = RaggedBatch(
        queries=queries,
        keys=keys,
        values=values,
        kv_cache=_poisoned_cache(
            rng,
            (num_pages, num_kv_heads, head_dim, page_size),
            cache_dtype,
            nan_payloads,
        ),
        kv_lens=kv_lens,
        page_indices=page_table.reshape(-1),
        cu_q_lens=cu_q_lens,
        distribution=np.array(distribution, np.int32),
        sinks=rng.standard_normal(num_q_heads, np.float32) if with_sinks else None,
        page_size=page_size,
    )
    holds_new_tokens = cache_holds_new_tokens and new_tokens_have_slots
    _fill_live_slots(rng, batch, k_scale, v_scale, holds_new_tokens)
    return batch


def _normal_rows(rng, num_live, num_tokens, head_dim, dtype, num_heads):
    rows = np.full((num_tokens, num_heads, head_dim), np.nan, np.float32)
    rows[:num_live] = rng.standard_normal((num_live, num_heads, head_dim), np.float32)
    return rows.astype(dtype)


def _page_table(
    rng,
    sequences,
    new_tokens_have_slots,
    num_sequences,
    page_size,
    pages_per_sequence,
    num_spare_pages,
    shared_prefix_pages,
):
    needed = [
        math.ceil((kv if new_tokens_have_slots else kv - q) / page_size)
        if q and kv
        else 0
        for q, kv in sequences
    ]
    width = pages_per_sequence or max(needed, default=0) + 1
    assert max(needed, default=0) <= width
    num_pages = max(sum(needed) + shared_prefix_pages + num_spare_pages, 1)
    pool = iter(rng.permutation(num_pages).tolist())
    shared = [next(pool) for _ in range(shared_prefix_pages)]
    table = rng.choice(np.append(_GARBAGE, num_pages), (num_sequences, width))
    for s, (q_len, kv_len) in enumerate(sequences):
        has_prefix = kv_len - q_len >= shared_prefix_pages * page_size
        prefix = shared if needed[s] and has_prefix else []
        own = [next(pool) for _ in range(needed[s] - len(prefix))]
        table[s, : needed[s]] = prefix + own
    return table.astype(np.int32), num_pages


def _poisoned_cache(rng, sizes, dtype, nan_payloads):
    num_pages, num_kv_heads, head_dim, page_size = sizes
    packing = 4 // dtype.itemsize
    shape = (
        num_pages,
        num_kv_heads * (1 if head_dim <= 64 else 2),
        page_size // packing,
        packing,
        math.ceil(head_dim / 128) * 128,
    )
    unsigned = np.dtype(f"u{dtype.itemsize}")
    if dtype == np.int8:
        return rng.integers(-128, 128, shape, np.int8)
    patterns = np.array(_POISON_BITS[dtype.name], unsigned)
    if nan_payloads:
        every = np.arange(2**16 if dtype.itemsize > 1 else 2**8, dtype=np.uint32)
        every = every << (8 * dtype.itemsize - (16 if dtype.itemsize > 1 else 8))
        every = every.astype(unsigned)
        patterns = every[~np.isfinite(every.view(dtype).astype(np.float32))]
    return rng.choice(patterns, shape).view(dtype)


def _fill_live_slots(rng, batch, k_scale, v_scale, holds_new_tokens):
    head_dim = batch.queries.shape[2]
    cache, num_kv_heads = batch.kv_cache, batch.keys.shape[1]
    address = oracle.slot_address(cache, num_kv_heads, head_dim, batch.page_size)
    for sequence in oracle.live_sequences(
        batch.kv_lens,
        batch.page_indices,
        batch.cu_q_lens,
        batch.distribution,
        batch.page_size,
    ):
        num_old = max(sequence.kv_len - sequence.q_len, 0)
        old = slice(0, num_old)
        shape = (num_old, num_kv_heads, head_dim)
        oracle.write_slots(
            cache,
            address,
            sequence.pages[old],
            sequence.slots[old],
            oracle.store(rng.standard_normal(shape, np.float32), cache.dtype, k_scale),
            oracle.store(rng.standard_normal(shape, np.float32), cache.dtype, v_scale),
        )
        if holds_new_tokens:
            new = slice(num_old, None)
            rows = slice(sequence.first_row, sequence.first_row + sequence.q_len)
            oracle.write_slots(
                cache,
                address,
                sequence.pages[new],
                sequence.slots[new],
                oracle.store(batch.keys[rows], cache.dtype, k_scale),
                oracle.store(batch.values[rows], cache.dtype, v_scale),
            )

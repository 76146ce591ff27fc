"""Ragged paged attention in float64 numpy, token by token.

It shares no code with the libraries it judges. It finds keys and values by its own
arithmetic on the bytes of the cache, and returns everything the operator returns:
the output and the whole cache.
"""

import dataclasses
import math

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class SlotAddress:
    """Where the bytes of one key or value vector are.

    A cache is a run of rows; the row of (page, head, slot) holds one vector, or for
    head_dim <= 64 a key at byte 0 and its value at the byte of lane 64.
    """

    num_kv_heads: int
    head_dim: int
    page_size: int
    itemsize: int

    @property
    def row_bytes(self) -> int:
        return math.ceil(self.head_dim / 128) * 128 * self.itemsize

    def rows(self, kind: str, pages, slots) -> np.ndarray:
        """Row numbers [len(pages), Hkv] of the keys or values in (page, slot)."""
        pages = np.asarray(pages, np.int64)[:, None]
        slots = np.asarray(slots, np.int64)[:, None]
        heads = np.arange(self.num_kv_heads)
        if self.head_dim <= 64:
            return (pages * self.num_kv_heads + heads) * self.page_size + slots
        group = {"key": 0, "value": 1}[kind]
        plane = (pages * 2 + group) * self.num_kv_heads + heads
        return plane * self.page_size + slots

    def columns(self, kind: str) -> slice:
        """The bytes of the vector within its row."""
        is_second_half = self.head_dim <= 64 and kind == "value"
        start = 64 * self.itemsize if is_second_half else 0
        return slice(start, start + self.head_dim * self.itemsize)


def slot_address(
    kv_cache: np.ndarray, num_kv_heads: int, head_dim: int, page_size: int
) -> SlotAddress:
    """The addresses in a given cache, whose size in bytes must fit."""
    address = SlotAddress(num_kv_heads, head_dim, page_size, kv_cache.dtype.itemsize)
    row_kinds = 1 if head_dim <= 64 else 2
    page_bytes = row_kinds * num_kv_heads * page_size * address.row_bytes
    assert kv_cache.nbytes % page_bytes == 0, f"{kv_cache.shape=} {address=}"
    return address


def write_slots(
    kv_cache: np.ndarray,
    address: SlotAddress,
    pages,
    slots,
    keys: np.ndarray,
    values: np.ndarray,
) -> None:
    """Writes [n, Hkv, D] stored keys and values in place, other lanes becoming zero."""
    rows = kv_cache.reshape(-1).view(np.uint8).reshape(-1, address.row_bytes)
    vectors = {"key": keys, "value": values}
    for kind in vectors:
        rows[address.rows(kind, pages, slots)] = 0
    for kind, stored in vectors.items():
        data = np.ascontiguousarray(stored, kv_cache.dtype).view(np.uint8)
        rows[address.rows(kind, pages, slots), address.columns(kind)] = data


def read_slots(
    kv_cache: np.ndarray, address: SlotAddress, pages, slots
) -> tuple[np.ndarray, np.ndarray]:
    """Stored keys and values [n, Hkv, D] of the given slots, in the cache dtype."""
    rows = kv_cache.reshape(-1).view(np.uint8).reshape(-1, address.row_bytes)
    keys, values = (
        np.ascontiguousarray(
            rows[address.rows(kind, pages, slots), address.columns(kind)]
        ).view(kv_cache.dtype)
        for kind in ("key", "value")
    )
    return keys, values


# A number, or one for each key head.
Scale = float | np.ndarray | None


def of_heads(scale: Scale, num_heads: int) -> np.ndarray:
    """A scale as float64[heads, 1], its numbers for as many heads each; None is 1."""
    scale = np.asarray(1.0 if scale is None else scale, np.float64).reshape(-1)
    return np.repeat(scale, num_heads // len(scale))[:, None]


def store(numbers: np.ndarray, dtype, scale: Scale) -> np.ndarray:
    """Numbers as a cache of ``dtype`` holds them: scaled, clipped, rounded to even.

    The numbers are [..., heads, D] if there is a scale for each key head.

    Dividing by the scale means one float32 product with 1.0 / scale. Left to itself
    XLA turns a division by a constant into a product with a reciprocal that is
    rounded differently, and others divide: only the product has the same bytes
    everywhere.
    """
    dtype = np.dtype(dtype)
    numbers = np.asarray(numbers).astype(np.float32)
    if scale is not None:
        if np.ndim(scale) > 0:
            scale = of_heads(scale, numbers.shape[-2])
        numbers = numbers * np.float32(1.0 / np.float64(scale))
    if dtype == np.int8:
        numbers = np.nan_to_num(numbers)  # padding; any integer will do
        return np.clip(np.rint(numbers), -128, 127).astype(np.int8)
    if dtype.itemsize == 1:
        largest = np.float32(ml_dtypes.finfo(dtype).max)
        numbers = np.clip(numbers, -largest, largest)
    return numbers.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One live sequence with something to do."""

    first_row: int  # its first row of queries
    q_len: int
    kv_len: int
    pages: np.ndarray  # page of each position, i64[kv_len]
    slots: np.ndarray  # slot of each position, i64[kv_len]


def live_sequences(kv_lens, page_indices, cu_q_lens, distribution, page_size):
    """The sequences that read or write anything."""
    page_table = np.asarray(page_indices).reshape(len(kv_lens), -1)
    found = []
    for s in range(int(distribution[2])):
        q_len = int(cu_q_lens[s + 1]) - int(cu_q_lens[s])
        kv_len = int(kv_lens[s])
        if q_len == 0 or kv_len == 0:
            continue
        position = np.arange(kv_len)
        column = np.minimum(position // page_size, page_table.shape[1] - 1)
        found.append(
            Sequence(
                first_row=int(cu_q_lens[s]),
                q_len=q_len,
                kv_len=kv_len,
                pages=page_table[s, column].astype(np.int64),
                slots=position % page_size,
            )
        )
    return found


def visible_positions(
    query_position: int,
    kv_len: int,
    causal: bool,
    sliding_window: int | None,
    attend: str = "all",
    q_len: int = 0,
    causal_block: int | None = None,
) -> slice:
    """The key positions that one query sees."""
    end = kv_len
    if causal and causal_block is None:
        end = min(kv_len, query_position + 1)
    elif causal_block is not None:
        end = min(kv_len, (query_position // causal_block + 1) * causal_block)
    start = 0
    if sliding_window is not None:
        start = max(0, query_position - sliding_window + 1)
    if attend == "cache":
        end = min(end, kv_len - q_len)
    elif attend == "new":
        start = max(start, kv_len - q_len)
    return slice(start, max(start, end))


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the operator must return.

    Attributes:
      out: float64[T, Hq, D].
      magnitude: float64[T, Hq, D], the sum of probability * abs(value): the size of
        the terms that were added, to which rounding errors are relative.
      lse: float64[T, Hq], the logarithm of the denominator.
      kv_cache: The whole cache, every byte.
    """

    out: np.ndarray
    magnitude: np.ndarray
    lse: np.ndarray
    kv_cache: np.ndarray


def cache_page_size(kv_cache: np.ndarray) -> int:
    """Tokens per page, from the two axes that count them."""
    return kv_cache.shape[2] * kv_cache.shape[3]


def cache_kv_heads(kv_cache: np.ndarray, head_dim: int) -> int:
    """Hkv, from axis 1."""
    return kv_cache.shape[1] // (1 if head_dim <= 64 else 2)


def expected_cache(
    keys,
    values,
    kv_cache,
    kv_lens,
    page_indices,
    cu_q_lens,
    distribution,
    *,
    head_dim: int,
    k_scale: Scale = None,
    v_scale: Scale = None,
    update_kv_cache: bool = True,
) -> np.ndarray:
    """A copy of the cache with the new tokens of every sequence in their slots."""
    kv_cache = np.array(kv_cache)
    if not update_kv_cache:
        return kv_cache
    page_size = cache_page_size(kv_cache)
    num_kv_heads = cache_kv_heads(kv_cache, head_dim)
    address = slot_address(kv_cache, num_kv_heads, head_dim, page_size)
    for sequence in live_sequences(
        kv_lens, page_indices, cu_q_lens, distribution, page_size
    ):
        for i in range(sequence.q_len):
            position = sequence.kv_len - sequence.q_len + i
            row = slice(sequence.first_row + i, sequence.first_row + i + 1)
            write_slots(
                kv_cache,
                address,
                sequence.pages[position : position + 1],
                sequence.slots[position : position + 1],
                store(keys[row], kv_cache.dtype, k_scale),
                store(values[row], kv_cache.dtype, v_scale),
            )
    return kv_cache


def ragged_paged_attention(
    queries,
    keys,
    values,
    kv_cache,
    kv_lens,
    page_indices,
    cu_q_lens,
    distribution,
    sinks=None,
    *,
    sm_scale: float = 1.0,
    causal: bool = True,
    causal_block: int | None = None,
    sliding_window: int | None = None,
    attend: str = "all",
    soft_cap: float | None = None,
    q_scale: Scale = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    update_kv_cache: bool = True,
) -> Expected:
    """Takes the numpy arguments of the operator; see ``Expected``."""
    num_tokens, num_q_heads, head_dim = queries.shape
    kv_cache = expected_cache(
        keys,
        values,
        kv_cache,
        kv_lens,
        page_indices,
        cu_q_lens,
        distribution,
        head_dim=head_dim,
        k_scale=k_scale,
        v_scale=v_scale,
        update_kv_cache=update_kv_cache,
    )
    page_size = cache_page_size(kv_cache)
    num_kv_heads = cache_kv_heads(kv_cache, head_dim)
    address = slot_address(kv_cache, num_kv_heads, head_dim, page_size)
    needs_no_new_tokens = attend == "cache" and not update_kv_cache
    if q_scale is not None:
        queries = store(queries, kv_cache.dtype, q_scale)
    out = np.zeros((num_tokens, num_q_heads, head_dim))
    magnitude = np.zeros_like(out)
    lse = np.full(out.shape[:2], -np.inf)
    for sequence in live_sequences(
        kv_lens, page_indices, cu_q_lens, distribution, page_size
    ):
        end = sequence.kv_len - (sequence.q_len if needs_no_new_tokens else 0)
        stored = read_slots(
            kv_cache, address, sequence.pages[:end], sequence.slots[:end]
        )
        # [Hkv, end, D]
        all_keys, all_values = (x.astype(np.float64).swapaxes(0, 1) for x in stored)
        all_keys = all_keys * of_heads(k_scale, num_kv_heads)[..., None]
        all_values = all_values * of_heads(v_scale, num_kv_heads)[..., None]
        for i in range(sequence.q_len):
            row = sequence.first_row + i
            seen = visible_positions(
                sequence.kv_len - sequence.q_len + i,
                sequence.kv_len,
                causal,
                sliding_window,
                attend,
                sequence.q_len,
                causal_block,
            )
            query = queries[row].astype(np.float64) * of_heads(q_scale, num_q_heads)
            out[row], magnitude[row], lse[row] = _attend(
                query, all_keys[:, seen], all_values[:, seen], sinks, sm_scale, soft_cap
            )
    return Expected(out=out, magnitude=magnitude, lse=lse, kv_cache=kv_cache)


def _attend(query, keys, values, sinks, sm_scale, soft_cap):
    """One query [Hq, D] over visible keys and values [Hkv, n, D]."""
    num_q_heads, head_dim = query.shape
    num_kv_heads, num_visible, _ = keys.shape
    if num_visible == 0:
        lse = np.full(num_q_heads, -np.inf) if sinks is None else sinks
        return np.zeros_like(query), np.zeros_like(query), lse
    # Query heads h * G .. (h + 1) * G - 1 share key head h.
    query = query.reshape(num_kv_heads, -1, head_dim)
    scores = sm_scale * (query @ keys.swapaxes(1, 2))
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    scores = scores.reshape(num_q_heads, num_visible)
    if sinks is not None:
        sink = np.asarray(sinks, np.float64)[:, None]
        scores = np.concatenate([scores, sink], axis=1)
    peak = scores.max(axis=1, keepdims=True)
    weights = np.exp(scores - peak)
    total = weights.sum(axis=1, keepdims=True)
    lse = (peak + np.log(total))[:, 0]
    weights /= total
    weights = weights[:, :num_visible].reshape(num_kv_heads, -1, num_visible)
    shape = (num_q_heads, head_dim)
    out = (weights @ values).reshape(shape)
    return out, (weights @ abs(values)).reshape(shape), lse

"""The numbers in lengths, page table and distribution, as one step has them.

Only live entries are looked at: sequences before ``distribution[2]``, and of those that
have new tokens the first ``ceil(kv_len / page_size)`` pages, or as many as the tokens
before need where new ones are neither written nor read. A sequence without new tokens,
or without any, is skipped wherever it stands.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jax_kernels.contract.arguments import CallSizes
from jax_kernels.contract.options import AttentionOptions


class Metadata(NamedTuple):
    """Arrays of integers on the host."""

    kv_lens: np.ndarray  # [S]
    page_indices: np.ndarray  # [S * P]
    cu_q_lens: np.ndarray  # [S + 1]
    distribution: np.ndarray  # [3]


class _Batch(NamedTuple):
    """The live sequences, 64 bits wide."""

    decode_end: int
    prefill_end: int
    kv_lens: np.ndarray  # [live]
    q_lens: np.ndarray  # [live]
    stored_lens: np.ndarray  # [live] tokens that have slots, the new ones included
    page_table: np.ndarray  # [live, P]

    @property
    def is_active(self) -> np.ndarray:
        """Which sequences read or write anything, bool[live]."""
        return (self.q_lens > 0) & (self.kv_lens > 0)


class _PageUses(NamedTuple):
    """Every live page of every active sequence, as arrays of one length.

    The sequence has tokens in the slots ``[0, end)`` of the page and writes those from
    ``begin`` on, which is ``end`` if it writes none of them.
    """

    page: np.ndarray
    sequence: np.ndarray
    column: np.ndarray
    begin: np.ndarray
    end: np.ndarray


def check_metadata(
    metadata: Metadata, sizes: CallSizes, options: AttentionOptions
) -> None:
    """Checks everything that a step demands of its numbers.

    Raises:
      ValueError: The first thing found wrong: a number out of range, a sequence in the
        wrong part of the distribution, a page twice in one sequence, or a slot that one
        sequence writes and another reads or writes.
    """
    batch = _check_ranges(metadata, sizes, options)
    _check_distribution(batch, options)
    uses = _shared_page_uses(batch, sizes)
    _check_pages_within_sequences(uses, sizes.cache.page_size)
    if options.update_kv_cache:
        _check_pages_between_sequences(uses)


def check_ranges(
    metadata: Metadata, sizes: CallSizes, options: AttentionOptions
) -> None:
    """Checks that lengths and page ids lie within what there is.

    Raises:
      ValueError: A number would lead out of an array.
    """
    _check_ranges(metadata, sizes, options)


def _check_ranges(
    metadata: Metadata, sizes: CallSizes, options: AttentionOptions
) -> _Batch:
    num_sequences = sizes.num_sequences
    decode_end, prefill_end, live = (int(end) for end in metadata.distribution)
    if not 0 <= decode_end <= prefill_end <= live <= num_sequences:
        raise ValueError(
            f"distribution must satisfy 0 <= i <= j <= k <= {num_sequences}, "
            f"got {[decode_end, prefill_end, live]}"
        )
    page_table = np.asarray(metadata.page_indices).reshape(num_sequences, -1)
    cu_q_lens = np.asarray(metadata.cu_q_lens, np.int64)[: live + 1]
    kv_lens = np.asarray(metadata.kv_lens, np.int64)[:live]
    q_lens = np.diff(cu_q_lens)
    batch = _Batch(
        decode_end=decode_end,
        prefill_end=prefill_end,
        kv_lens=kv_lens,
        q_lens=q_lens,
        stored_lens=kv_lens - q_lens if options.needs_no_new_tokens else kv_lens,
        page_table=page_table[:live].astype(np.int64),
    )
    if live:
        _check_query_starts(cu_q_lens, batch.q_lens, sizes.num_tokens)
        _check_lengths(batch, sizes)
        _check_page_ids(batch, sizes)
    return batch


def _check_query_starts(
    cu_q_lens: np.ndarray, q_lens: np.ndarray, num_tokens: int
) -> None:
    if cu_q_lens[0] != 0:
        raise ValueError(f"cu_q_lens[0] must be 0, got {cu_q_lens[0]}")
    for s in np.flatnonzero(q_lens < 0)[:1]:
        raise ValueError(
            f"cu_q_lens must not decrease, got {cu_q_lens[s]} and {cu_q_lens[s + 1]} "
            f"for sequence {s}"
        )
    if cu_q_lens[-1] > num_tokens:
        raise ValueError(
            f"cu_q_lens[{len(q_lens)}] must be at most the {num_tokens} tokens of q, "
            f"got {cu_q_lens[-1]}"
        )


def _check_lengths(batch: _Batch, sizes: CallSizes) -> None:
    kv_lens, q_lens = batch.kv_lens, batch.q_lens
    capacity = sizes.pages_per_sequence * sizes.cache.page_size
    most = capacity + (kv_lens - batch.stored_lens)
    for s in np.flatnonzero((kv_lens < 0) | (kv_lens > most))[:1]:
        raise ValueError(
            f"kv_lens[{s}] must be in [0, {most[s]}] (its row of page_indices), "
            f"got {kv_lens[s]}"
        )
    for s in np.flatnonzero(q_lens > kv_lens)[:1]:
        raise ValueError(
            f"kv_lens[{s}] must count the new tokens too: at least {q_lens[s]}, "
            f"got {kv_lens[s]}"
        )


def _live_pages(batch: _Batch, page_size: int) -> np.ndarray:
    """Which entries of the page table are used, bool[live, P]."""
    first_position = np.arange(batch.page_table.shape[1]) * page_size
    stored_lens = np.where(batch.is_active, batch.stored_lens, 0)
    return first_position < stored_lens[:, None]


def _check_page_ids(batch: _Batch, sizes: CallSizes) -> None:
    table, num_pages = batch.page_table, sizes.cache.num_pages
    is_wrong = _live_pages(batch, sizes.cache.page_size)
    is_wrong &= (table < 0) | (table >= num_pages)
    for s, column in np.argwhere(is_wrong)[:1]:
        raise ValueError(
            f"page_indices[{s * table.shape[1] + column}] (page {column} of sequence "
            f"{s}) must be in [0, {num_pages}), got {table[s, column]}"
        )


def _check_distribution(batch: _Batch, options: AttentionOptions) -> None:
    """Raises if a sequence has more or fewer new tokens than its range promises."""
    decode_q_len, chunk = options.decode_q_len, options.chunk_prefill_size
    for s in np.flatnonzero(batch.q_lens[: batch.decode_end] > decode_q_len)[:1]:
        raise ValueError(
            f"distribution puts sequence {s} among the decode ones: it must have at "
            f"most decode_q_len = {decode_q_len} new tokens by cu_q_lens, got "
            f"{batch.q_lens[s]}"
        )
    if chunk is None:
        return
    begin, end = batch.decode_end, batch.prefill_end
    q_lens = batch.q_lens[begin:end]
    for s in begin + np.flatnonzero((q_lens != chunk) & (q_lens != 0))[:1]:
        raise ValueError(
            f"distribution puts sequence {s} among the prefill ones: it must have "
            f"{chunk} new tokens by cu_q_lens, got {batch.q_lens[s]}"
        )


def _shared_page_uses(batch: _Batch, sizes: CallSizes) -> _PageUses:
    """The uses of pages that are used more than once, the only ones that can clash.

    They are in the order of pages, those of a page in the order of the page table.
    """
    page_size = sizes.cache.page_size
    sequence, column = np.nonzero(_live_pages(batch, page_size))
    page = batch.page_table[sequence, column]
    shared = np.flatnonzero(
        np.bincount(page, minlength=sizes.cache.num_pages)[page] > 1
    )
    shared = shared[np.argsort(page[shared], kind="stable")]
    page, sequence, column = page[shared], sequence[shared], column[shared]
    kv_lens, q_lens = batch.kv_lens[sequence], batch.q_lens[sequence]
    end = np.minimum(batch.stored_lens[sequence] - column * page_size, page_size)
    begin = np.maximum(kv_lens - q_lens - column * page_size, 0)
    return _PageUses(page, sequence, column, np.minimum(begin, end), end)


def _check_pages_within_sequences(uses: _PageUses, page_size: int) -> None:
    is_again = uses.page[1:] == uses.page[:-1]
    is_again &= uses.sequence[1:] == uses.sequence[:-1]
    for number in np.flatnonzero(is_again)[:1]:
        first, second = uses.column[number : number + 2]
        raise ValueError(
            f"page_indices must name each page of a sequence once, got page "
            f"{uses.page[number]} as page {first} and page {second} of sequence "
            f"{uses.sequence[number]}: its slot 0 would hold position "
            f"{first * page_size} and position {second * page_size}"
        )


def _check_pages_between_sequences(uses: _PageUses) -> None:
    """Raises if a sequence writes a slot that is live in another.

    What a sequence writes in a page reaches to its end there. So it meets another
    exactly if it begins before the furthest end of the others.
    """
    if not len(uses.page):
        return
    first = np.flatnonzero(np.append(True, uses.page[1:] != uses.page[:-1]))
    group = np.repeat(np.arange(len(first)), np.diff(first, append=len(uses.page)))
    furthest = np.maximum.reduceat(uses.end, first)[group]
    reaches = np.flatnonzero(uses.end == furthest)
    holder = reaches[np.searchsorted(group[reaches], np.arange(len(first)))]
    others_end, end_but_holder = furthest, uses.end.copy()
    end_but_holder[holder] = 0
    others_end[holder] = np.maximum.reduceat(end_but_holder, first)
    clashes = (uses.begin < uses.end) & (uses.begin < others_end)
    for a in np.flatnonzero(clashes)[:1]:
        slot = uses.begin[a]
        is_other = (uses.page == uses.page[a]) & (uses.end > slot)
        is_other[a] = False
        b = np.flatnonzero(is_other)[0]
        verb = "writes" if uses.begin[b] <= slot else "reads"
        raise ValueError(
            f"page_indices must give each new token a slot of its own, got slot "
            f"{slot} of page {uses.page[a]}, which sequence {uses.sequence[a]} writes "
            f"and sequence {uses.sequence[b]} {verb}"
        )

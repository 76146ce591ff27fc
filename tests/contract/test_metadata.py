"""Rules of lengths, page tables and distributions."""

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_kernels.contract import (
    AttentionOptions,
    CacheGeometry,
    CallSizes,
    Metadata,
    check_metadata,
    check_ranges,
)

pytestmark = pytest.mark.versions


def make_sizes(num_sequences, pages_per_sequence, page_size, num_pages, num_tokens):
    cache = CacheGeometry(num_pages, page_size, 2, 128, "bfloat16")
    return CallSizes(
        num_tokens,
        num_sequences,
        pages_per_sequence,
        4,
        "bfloat16",
        "bfloat16",
        cache,
    )


SIZES = make_sizes(5, 3, 16, num_pages=8, num_tokens=16)


def make_metadata(**changes):
    """Decode, prefill by 8, mixed, an empty sequence, then one that is not live."""
    values = {
        "kv_lens": [20, 24, 5, 3, -7],
        "page_indices": [
            *(4, 5, -1),  # positions 0..19
            *(4, 6, 99),  # 0..23: page 4 is a shared prefix
            *(7, -1, -1),
            *(-1, -1, -1),
            *(99, 99, 99),
        ],
        "cu_q_lens": [0, 1, 9, 14, 14, 9999],
        "distribution": [1, 2, 4],
    } | changes
    return Metadata(**{name: np.array(v, np.int32) for name, v in values.items()})


def check(
    metadata: Metadata | None = None,
    sizes: CallSizes = SIZES,
    chunk_prefill_size: int | None = 8,
    **options: Any,
):
    given = AttentionOptions(chunk_prefill_size=chunk_prefill_size, **options)
    check_metadata(metadata or make_metadata(), sizes, given)


def pages(*, sequence, column, page):
    table = make_metadata().page_indices.copy()
    table[sequence * 3 + column] = page
    return {"page_indices": table}


def test_valid_metadata_passes_whatever_its_dead_entries():
    check()


def test_no_live_sequences_is_valid():
    check(make_metadata(distribution=[0, 0, 0], cu_q_lens=[9] * 6))


def test_prefill_may_have_any_length_without_a_chunk_size():
    check(make_metadata(cu_q_lens=[0, 1, 8, 13, 13, 0]), chunk_prefill_size=None)


def test_a_sequence_without_new_tokens_is_skipped_in_every_range():
    check(make_metadata(cu_q_lens=[0, 0, 0, 5, 5, 0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distribution": [2, 1, 4]}, r"distribution must .*<= 5, got \[2, 1, 4\]"),
        ({"distribution": [1, 3, 2]}, "distribution must satisfy"),
        ({"distribution": [-1, 2, 4]}, "distribution must satisfy"),
        ({"distribution": [1, 2, 6]}, "distribution must satisfy"),
        ({"cu_q_lens": [1, 2, 10, 15, 15, 0]}, r"cu_q_lens\[0\] must be 0, got 1"),
        ({"cu_q_lens": [0, 1, 9, 8, 14, 0]}, "cu_q_lens must not decrease.*sequence 2"),
        ({"cu_q_lens": [0, 1, 9, 14, 17, 0]}, r"cu_q_lens\[4\] must .* 16 tokens of q"),
        ({"kv_lens": [20, 24, 49, 3, 0]}, r"kv_lens\[2\] must be in \[0, 48\].*got 49"),
        ({"kv_lens": [20, 24, 5, -1, 0]}, r"kv_lens\[3\] must be in .*got -1"),
        ({"kv_lens": [20, 24, 4, 3, 0]}, r"kv_lens\[2\] must count .* least 5, got 4"),
        ({"kv_lens": [0, 24, 5, 3, 0]}, r"kv_lens\[0\] must count .* at least 1"),
        (
            pages(sequence=0, column=1, page=-1),
            r"page_indices\[1\] \(page 1 of",
        ),
        (
            pages(sequence=1, column=1, page=8),
            r"sequence 1\) must be in \[0, 8\)",
        ),
    ],
)
def test_numbers_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        check(make_metadata(**change))
    with pytest.raises(ValueError, match=message):
        check_ranges(make_metadata(**change), SIZES, AttentionOptions())


@pytest.mark.parametrize(
    ("change", "chunk", "message"),
    [
        (
            {"distribution": [2, 2, 4]},
            8,
            r"distribution .*sequence 1 among the decode .*decode_q_len = 1 new tokens "
            "by cu_q_lens, got 8",
        ),
        ({}, 9, "sequence 1 among the prefill ones: .* 9 new .* got 8"),
        ({"distribution": [1, 3, 4]}, 8, "sequence 2 among the prefill ones: .* got 5"),
    ],
)
def test_a_sequence_in_the_wrong_part_is_named(change, chunk, message):
    with pytest.raises(ValueError, match=message):
        check(make_metadata(**change), chunk_prefill_size=chunk)
    check_ranges(make_metadata(**change), SIZES, AttentionOptions())


def test_decodes_may_have_up_to_decode_q_len_new_tokens():
    metadata = make_metadata(cu_q_lens=[0, 3, 4, 8, 8, 0], distribution=[4, 4, 4])
    check(metadata, decode_q_len=4)
    with pytest.raises(ValueError, match=r"sequence 2 .*decode_q_len = 3 .* got 4"):
        check(metadata, decode_q_len=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Sequence 2 writes slots 0 to 4; 1 writes slots 0 to 7 of page 6; 0 reads 0 to
        # 2 and writes 3 of page 5.
        (
            pages(sequence=2, column=0, page=6),
            "slot 0 of page 6, which sequence 1 writes and sequence 2 writes",
        ),
        (
            pages(sequence=2, column=0, page=5),
            "slot 3 of page 5, which sequence 0 writes and sequence 2 writes",
        ),
        (
            pages(sequence=1, column=1, page=4),
            "page 4 as page 0 and page 1 of sequence 1: .* position 0 and position 16",
        ),
        (
            pages(sequence=0, column=1, page=6) | {"kv_lens": [26, 24, 5, 3, 0]},
            "slot 0 of page 6, which sequence 1 writes and sequence 0 reads",
        ),
    ],
)
def test_slots_that_clash_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        check(make_metadata(**change))


def test_slots_may_be_shared_when_nothing_is_written():
    check(make_metadata(**pages(sequence=2, column=0, page=6)), update_kv_cache=False)


def test_the_page_allocators_classic_mistake_is_refused():
    """A page handed out twice: row 0, 1, 2, 3, 0, 5."""
    sizes = make_sizes(1, 6, 8, num_pages=8, num_tokens=4)
    metadata = Metadata(
        *(np.array(x) for x in ([48], [0, 1, 2, 3, 0, 5], [0, 4], [0, 0, 1]))
    )
    with pytest.raises(ValueError, match="page 0 as page 0 and page 4 of sequence 0"):
        check(metadata, sizes, None)


@st.composite
def random_metadata(draw):
    """A few sequences over very few pages, some of whose slots clash."""
    num_sequences = draw(st.integers(1, 4))
    kv_lens = draw(st.lists(st.integers(0, 24), min_size=4, max_size=4))
    q_lens = [draw(st.integers(0, min(kv_len, 20))) for kv_len in kv_lens]
    table = draw(st.lists(st.integers(0, 9), min_size=12, max_size=12))
    return Metadata(
        np.array(kv_lens),
        np.array(table),
        np.concatenate([[0], np.cumsum(q_lens)]),
        np.array([0, 0, num_sequences]),
    )


def clashes(metadata, page_size, updates):
    """The rule, slot by slot."""
    table = metadata.page_indices.reshape(4, 3)
    readers, writers, is_doubled = {}, {}, False
    for s in range(metadata.distribution[2]):
        q_len = metadata.cu_q_lens[s + 1] - metadata.cu_q_lens[s]
        kv_len = metadata.kv_lens[s]
        if q_len == 0:
            continue
        row = table[s, : -(-kv_len // page_size)]
        is_doubled |= len(set(row)) < len(row)
        for position in range(kv_len):
            place = (row[position // page_size], position % page_size)
            is_new = position >= kv_len - q_len
            (writers if is_new else readers).setdefault(place, []).append(s)
    shared = any(
        len(users) + len(readers.get(place, [])) > 1 for place, users in writers.items()
    )
    return is_doubled or (updates and shared)


@given(random_metadata(), st.booleans())
def test_exactly_the_slots_that_clash_are_refused(metadata, updates):
    sizes = make_sizes(4, 3, 8, num_pages=10, num_tokens=80)
    if clashes(metadata, 8, updates):
        with pytest.raises(ValueError, match="page_indices must"):
            check(metadata, sizes, None, update_kv_cache=updates)
    else:
        check(metadata, sizes, None, update_kv_cache=updates)


@pytest.mark.parametrize("shares_prefix", [False, True])
def test_a_large_batch_is_checked_in_well_under_a_second(shares_prefix):
    num_sequences, columns, page_size = 256, 2048, 16
    num_pages = num_sequences * columns
    sizes = make_sizes(num_sequences, columns, page_size, num_pages, num_sequences)
    table = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    table = table.reshape(num_sequences, columns)
    if shares_prefix:
        table[:, :-1] = table[0, :-1]
    metadata = Metadata(
        np.full(num_sequences, columns * page_size, np.int32),
        table.reshape(-1),
        np.arange(num_sequences + 1, dtype=np.int32),
        np.full(3, num_sequences, np.int32),
    )
    start = time.perf_counter()
    check(metadata, sizes, None)
    # 0.05 to 0.2 s where nothing else runs.
    assert time.perf_counter() - start < 2.0


def test_new_tokens_that_are_neither_written_nor_read_need_no_slots():
    """Three full pages before the first sequence's token; one before 40 tokens."""
    metadata = make_metadata(
        kv_lens=[49, 56, 5, 3, -7],
        page_indices=[4, 5, 6, 4, -1, -1, *[-1] * 9],
        cu_q_lens=[0, 1, 41, 46, 46, 9999],
        distribution=[1, 1, 3],
    )
    sizes = make_sizes(5, 3, 16, num_pages=8, num_tokens=64)
    with pytest.raises(ValueError, match=r"kv_lens\[0\] must be in \[0, 48\]"):
        check_ranges(metadata, sizes, AttentionOptions(update_kv_cache=False))
    options = AttentionOptions(attend="cache", update_kv_cache=False)
    check_metadata(metadata, sizes, options)
    longer = metadata._replace(kv_lens=np.array([50, 56, 5, 3, -7], np.int32))
    with pytest.raises(ValueError, match=r"kv_lens\[0\] must be in \[0, 49\]"):
        check_metadata(longer, sizes, options)

"""The kernel on degenerate batches, and on lengths around every boundary.

All batches of a layout have the same shapes, so the kernel is compiled once for each.
"""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_kernels.ragged_paged_attention.kernel.padding import CLEARED_TOKENS
from tests.support.interpret import (
    SMALL_BLOCKS,
    assert_kernel_matches_oracle,
    run_kernel,
)
from tests.support.numerics import assert_same_bytes
from tests.support.ragged_batches import RaggedBatch, make_ragged_batch

PAGE_SIZE = 16
MAX_SEQUENCES = 24
PAGES_PER_SEQUENCE = 12
MAX_TOKENS = 256
NUM_PAGES = 160
OPTIONS: dict[str, Any] = {"sm_scale": 0.1}

# The packed rows of the first hold two tokens, those of the second four.
LAYOUTS = {
    "split_bf16": {"head_dim": 128, "q_dtype": "bfloat16"},
    "fused_e4m3": {
        "head_dim": 64,
        "q_dtype": "bfloat16",
        "cache_dtype": "float8_e4m3fn",
        "num_q_heads": 2,
        "num_kv_heads": 2,
    },
}


def make_batch(sequences, distribution=None, layout="split_bf16") -> RaggedBatch:
    needed = sum(math.ceil(kv / PAGE_SIZE) for q, kv in sequences if q and kv)
    return make_ragged_batch(
        sequences,
        distribution=distribution,
        page_size=PAGE_SIZE,
        max_sequences=MAX_SEQUENCES,
        pages_per_sequence=PAGES_PER_SEQUENCE,
        num_tokens=MAX_TOKENS,
        num_spare_pages=NUM_PAGES - needed,
        **LAYOUTS[layout],
    )


@pytest.mark.parametrize(
    "distribution, sequences",
    [
        ((0, 0, 0), []),
        ((1, 1, 1), [(1, 5)]),
        ((3, 3, 3), [(1, 33), (1, 1), (1, 64)]),
        ((0, 0, 1), [(5, 9)]),
        ((0, 0, 2), [(1, 9), (7, 20)]),
        ((0, 2, 2), [(7, 20), (40, 40)]),
        ((1, 1, 3), [(1, 9), (7, 20), (1, 70)]),
        ((1, 2, 3), [(1, 9), (7, 20), (35, 70)]),
    ],
    ids=lambda value: str(value).replace(" ", "") if len(value) == 3 else "",
)
def test_every_distribution_serves_its_sequences(distribution, sequences):
    """A prefill range without a chunk size is not skipped; an empty batch is one."""
    assert_kernel_matches_oracle(make_batch(sequences, distribution), **OPTIONS)


@pytest.mark.parametrize(
    "distribution, sequences",
    [
        ((1, 1, 5), [(1, 17), (0, 0), (7, 20), (0, 33), (4, 4)]),
        ((4, 4, 6), [(0, 9), (1, 17), (0, 0), (1, 2), (0, 50), (9, 9)]),
        ((0, 0, 3), [(0, 0), (0, 5), (0, 0)]),
        ((2, 2, 2), [(0, 0), (0, 5)]),
    ],
    ids=["among_mixed", "among_decodes", "only_mixed", "only_decodes"],
)
def test_sequences_without_queries_neither_hang_nor_write(distribution, sequences):
    """Rule 4."""
    assert_kernel_matches_oracle(make_batch(sequences, distribution), **OPTIONS)


@pytest.mark.parametrize(
    "distribution, sequences",
    [
        ((2, 2, 4), [(1, 0), (1, 17), (5, 0), (4, 9)]),
        ((0, 0, 2), [(40, 0), (1, 0)]),
    ],
    ids=["among_others", "alone"],
)
def test_queries_without_any_key_give_zeros_and_write_nothing(distribution, sequences):
    """Rules 4 and 6: such lengths are invalid, but must not hang or do damage."""
    batch = make_batch(sequences, distribution)
    out, _ = assert_kernel_matches_oracle(batch, **OPTIONS)
    for s, (_, kv_len) in enumerate(sequences):
        if kv_len == 0:
            rows = out[batch.cu_q_lens[s] : batch.cu_q_lens[s + 1]]
            assert not np.any(rows.astype(np.float32))


# They are cleared in pieces of CLEARED_TOKENS and a rest.
@pytest.mark.slow
@pytest.mark.parametrize(
    "num_live",
    [0, 1, CLEARED_TOKENS - 1, CLEARED_TOKENS, CLEARED_TOKENS + 1, MAX_TOKENS],
)
def test_rows_past_the_last_sequence_are_zeros(num_live):
    """Rule 5."""
    assert MAX_TOKENS % CLEARED_TOKENS == 0
    sequences = [(min(num_live, 128), 130)] if num_live else []
    if num_live > 128:
        sequences.append((num_live - 128, 150))
    batch = make_batch(sequences)
    assert batch.num_live_tokens == num_live
    out, _ = assert_kernel_matches_oracle(batch, **OPTIONS)
    assert not np.any(out[num_live:].astype(np.float32))


# A packed row, a page (16), a block and a tile (32), and several of them.
BOUNDARIES = (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 97, 192)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decodes_of_every_length_around_a_boundary(layout):
    sequences = [(1, kv_len) for kv_len in BOUNDARIES]
    assert_kernel_matches_oracle(make_batch(sequences, layout=layout), **OPTIONS)


# Each layout within a packed row and beyond a block; the rest is left to a longer run.
CHUNK_STARTS = [
    ("split_bf16", 0),
    ("split_bf16", 33),
    ("fused_e4m3", 3),
    ("fused_e4m3", 30),
    pytest.param("split_bf16", 3, marks=pytest.mark.extended),
    pytest.param("split_bf16", 30, marks=pytest.mark.extended),
    pytest.param("fused_e4m3", 0, marks=pytest.mark.extended),
    pytest.param("fused_e4m3", 33, marks=pytest.mark.extended),
]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "num_old"), CHUNK_STARTS)
def test_chunks_that_start_and_end_around_a_boundary(layout, num_old):
    q_lens = (2, 3, 17, 31, 32, 33, 64)
    sequences = [(q_len, num_old + q_len) for q_len in q_lens]
    assert_kernel_matches_oracle(make_batch(sequences, layout=layout), **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "distribution, sequences",
    [
        ((0, 0, 0), []),
        ((0, 2, 2), [(32, 32), (32, 67)]),
        ((1, 1, 2), [(1, 20), (7, 20)]),
        ((1, 3, 3), [(1, 20), (32, 33), (32, 64)]),
        ((0, 1, 2), [(32, 35), (1, 20)]),
        ((1, 2, 4), [(1, 20), (32, 190), (0, 0), (50, 70)]),
        ((0, 3, 3), [(32, 47), (0, 9), (32, 48)]),
    ],
    ids=lambda value: str(value).replace(" ", "") if len(value) == 3 else "",
)
def test_every_distribution_with_a_chunk_size(distribution, sequences):
    batch = make_batch(sequences, distribution, layout="fused_e4m3")
    assert_kernel_matches_oracle(batch, chunk_prefill_size=32, **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "distribution, sequences",
    [
        ((3, 3, 3), [(1, 33), (1, 1), (1, 190)]),
        ((0, 2, 2), [(32, 32), (32, 67)]),
        ((0, 0, 3), [(7, 20), (0, 9), (70, 101)]),
        ((1, 2, 4), [(1, 20), (32, 190), (0, 0), (50, 70)]),
    ],
    ids=["decode", "prefill", "mixed", "all"],
)
def test_copies_may_end_as_soon_as_they_start(distribution, sequences):
    """Elsewhere they end when they are awaited: what is between is up to the TPU."""
    batch = make_batch(sequences, distribution, layout="fused_e4m3")
    assert_kernel_matches_oracle(
        batch, chunk_prefill_size=32, copies="eager", **OPTIONS
    )


@st.composite
def ragged_sequences(draw):
    """Up to eight (q_len, kv_len) that fit the shapes above, and a distribution."""
    max_len = PAGES_PER_SEQUENCE * PAGE_SIZE
    decodes = draw(st.lists(st.integers(1, max_len), max_size=4))
    mixed = []
    for _ in range(draw(st.integers(0, 4))):
        q_len = draw(st.integers(0, 64))
        mixed.append((q_len, draw(st.integers(q_len, max_len))))
    sequences = [(1, kv_len) for kv_len in decodes] + mixed
    prefill_end = draw(st.integers(len(decodes), len(sequences)))
    return sequences, (len(decodes), prefill_end, len(sequences))


@pytest.mark.slow
@settings(deadline=None, max_examples=10, derandomize=True)
@given(ragged_sequences())
def test_any_batch_matches_the_oracle(drawn):
    sequences, distribution = drawn
    assert_kernel_matches_oracle(make_batch(sequences, distribution), **OPTIONS)


@pytest.mark.slow
def test_the_distribution_does_not_change_the_result():
    """A sequence with one query may be served by any loop."""
    sequences = [(1, 20), (1, 64), (1, 1), (1, 35)]
    outs, caches = [], []
    for distribution in ((4, 4, 4), (0, 0, 4), (2, 2, 4), (1, 3, 4)):
        batch = make_batch(sequences, distribution)
        out, kv_cache = assert_kernel_matches_oracle(batch, **OPTIONS)
        outs.append(out.astype(np.float32))
        caches.append(kv_cache)
    for out, kv_cache in zip(outs[1:], caches[1:], strict=True):
        np.testing.assert_allclose(out, outs[0], atol=0.02)
        assert_same_bytes(kv_cache, caches[0])


@pytest.mark.slow
def test_block_sizes_change_only_the_order_of_rounding():
    batch = make_batch([(1, 90), (3, 3), (70, 91)])
    small, small_cache = run_kernel(batch.jax_arguments, **OPTIONS)
    default, default_cache = run_kernel(
        batch.jax_arguments, block_sizes=None, **OPTIONS
    )
    assert SMALL_BLOCKS.block_kv < 64
    np.testing.assert_allclose(
        small.astype(np.float32), default.astype(np.float32), atol=0.02
    )
    assert_same_bytes(small_cache, default_cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, options",
    [("split_bf16", {}), ("fused_e4m3", {"sliding_window": 20})],
    ids=["all", "window"],
)
def test_infinite_sinks_give_zeros_or_change_nothing(layout, options):
    """exp(inf) in the denominator leaves nothing, exp(-inf) is no sink. In decode and
    in tiles, where rows of several query heads share registers; a window leaves whole
    blocks without a key that a row sees."""
    batch = make_batch([(1, 90), (1, 20), (40, 66), (3, 3)], (2, 2, 4), layout=layout)
    num_heads = batch.queries.shape[1]
    arguments = batch.jax_arguments[:8]

    def run(*sinks):
        repeated = np.resize(np.array(sinks, np.float32), num_heads)
        out, _ = run_kernel((*arguments, repeated), **OPTIONS, **options)
        return out

    mixed, finite = run(np.inf, -np.inf, 0.5), run(0.5, 0.5, 0.5)
    without, _ = run_kernel((*arguments, None), **OPTIONS, **options)
    kind = np.arange(num_heads) % 3
    live = batch.num_live_tokens
    assert not np.any(mixed[:, kind == 0].astype(np.float32))
    assert_same_bytes(mixed[:live, kind == 1], without[:live, kind == 1])
    assert_same_bytes(mixed[:, kind == 2], finite[:, kind == 2])
    assert np.any(finite[:live, kind == 0].astype(np.float32))

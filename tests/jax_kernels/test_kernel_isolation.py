"""Nothing that is not a sequence's own can reach its output: equal to the last bit.

Every test runs the same compiled kernel twice and compares bits, so no tolerance can
hide a trace of NaN times zero.
"""

import functools
from typing import Any

import numpy as np
import pytest

from tests.support.interpret import run_kernel
from tests.support.numerics import assert_same_bytes
from tests.support.ragged_batches import RaggedBatch, make_ragged_batch

# Each test compiles a simulation of its own.
pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {"sm_scale": 0.1}
SEQUENCES = [(1, 1), (1, 45), (1, 32), (5, 5), (40, 71), (9, 33)]
LAYOUTS = {
    "split_bf16": {"q_dtype": "bfloat16", "head_dim": 128},
    "odd_key_heads": {"q_dtype": "bfloat16", "head_dim": 96, "num_kv_heads": 1},
    "fused_e4m3": {
        "q_dtype": "bfloat16",
        "cache_dtype": "float8_e4m3fn",
        "head_dim": 64,
    },
}
INT_MAX = np.iinfo(np.int32).max


@functools.cache
def make_batch(layout: str) -> RaggedBatch:
    # Every dtype here has NaN, unlike int8.
    return make_ragged_batch(SEQUENCES, with_sinks=True, **LAYOUTS[layout])


@functools.cache
def run_unchanged(layout: str, window: int | None = None):
    """Output and cache of the batch as it is."""
    arguments = make_batch(layout).jax_arguments
    return run_kernel(arguments, sliding_window=window, **OPTIONS)


def rows_of(batch: RaggedBatch, sequence: int) -> slice:
    return slice(*map(int, batch.cu_q_lens[sequence : sequence + 2]))


def pages_of(batch: RaggedBatch, sequence: int) -> np.ndarray:
    num_pages = -(-int(batch.kv_lens[sequence]) // batch.page_size)
    return batch.page_table[sequence, :num_pages]


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(actual.view(np.uint8), expected.view(np.uint8))


def assert_changes_nothing(changed: RaggedBatch, layout: str) -> None:
    """Fails unless a changed batch gives the same output and the same cache."""
    out, kv_cache = run_unchanged(layout)
    new_out, new_cache = run_changed(changed)
    assert_same_bits(new_out, out)
    assert_same_bytes(new_cache, kv_cache)


def run_changed(batch: RaggedBatch, window: int | None = None):
    return run_kernel(batch.jax_arguments, sliding_window=window, **OPTIONS)


# Each sequence is the victim in one layout; the other is left to a longer run.
VICTIMS = [
    pytest.param(
        victim,
        layout,
        marks=pytest.mark.extended if (victim + number) % 2 else (),
    )
    for victim in range(len(SEQUENCES))
    for number, layout in enumerate(LAYOUTS)
]


@pytest.mark.parametrize(("victim", "layout"), VICTIMS)
def test_nan_in_one_sequence_leaves_every_other_bit_identical(victim, layout):
    batch = make_batch(layout)
    out, kv_cache = run_unchanged(layout)
    rows, pages = rows_of(batch, victim), pages_of(batch, victim)
    poisoned = {}
    for name in ("queries", "keys", "values"):
        poisoned[name] = getattr(batch, name).copy()
        poisoned[name][rows] = np.nan
    poisoned["kv_cache"] = batch.kv_cache.copy()
    poisoned["kv_cache"][pages] = np.nan
    changed = batch.replace(**poisoned)
    new_out, new_cache = run_changed(changed)

    assert np.isnan(new_out[rows].astype(np.float32)).all()
    others = np.delete(np.arange(len(out)), np.r_[rows])
    assert_same_bits(new_out[others], out[others])
    other_pages = np.setdiff1d(np.arange(len(kv_cache)), pages)
    assert_same_bytes(new_cache[other_pages], kv_cache[other_pages])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 11], ids=["no_window", "window"])
def test_dead_slots_may_hold_anything(layout, window):
    """Rule 2: a zero probability does not cancel NaN, so dead values are zeroed."""
    batch = make_batch(layout)
    is_poison = ~np.isfinite(batch.kv_cache.astype(np.float32))
    assert is_poison.any()
    clean = batch.replace(kv_cache=np.where(is_poison, 0, batch.kv_cache))
    out, _ = run_unchanged(layout, window)
    clean_out, _ = run_changed(clean, window)
    assert_same_bits(out, clean_out)


def test_pages_before_the_window_may_be_gone():
    """An engine frees the pages that a window has left: others fill them with NaN,
    and their entries in the page table become garbage."""
    window, layout = 11, "split_bf16"
    batch = make_batch(layout)
    kv_cache, table = batch.kv_cache.copy(), batch.page_table.copy()
    num_gone = 0
    for s, (q_len, kv_len) in enumerate(SEQUENCES):
        first_seen = max(kv_len - q_len - window + 1, 0)
        gone = slice(0, first_seen // batch.page_size)
        kv_cache[table[s, gone]] = np.nan
        table[s, gone] = -1
        num_gone += gone.stop
    assert num_gone >= 4
    changed = batch.replace(kv_cache=kv_cache, page_indices=table.reshape(-1))
    out, _ = run_unchanged(layout, window)
    new_out, _ = run_changed(changed, window)
    assert_same_bits(new_out, out)


@pytest.mark.parametrize("garbage", [-1, INT_MAX, 0])
def test_page_ids_past_the_live_pages_are_never_used(garbage):
    """Rule 3. Page 0 exists, so using it would show in its bytes."""
    layout = "split_bf16"
    batch = make_batch(layout)
    table = np.full_like(batch.page_table, garbage)
    for s in range(len(SEQUENCES)):
        pages = pages_of(batch, s)
        table[s, : len(pages)] = pages
    assert_changes_nothing(batch.replace(page_indices=table.reshape(-1)), layout)


@pytest.mark.parametrize("garbage", [0, 3, INT_MAX])
def test_metadata_past_the_live_sequences_is_ignored(garbage):
    layout = "split_bf16"
    batch = make_batch(layout)
    num_live = len(SEQUENCES)
    kv_lens, cu_q_lens = batch.kv_lens.copy(), batch.cu_q_lens.copy()
    kv_lens[num_live:] = garbage
    cu_q_lens[num_live + 1 :] = garbage
    assert_changes_nothing(batch.replace(kv_lens=kv_lens, cu_q_lens=cu_q_lens), layout)


def test_rows_of_padding_may_hold_anything():
    layout = "split_bf16"
    batch = make_batch(layout)
    filled = {}
    for name in ("queries", "keys", "values"):
        filled[name] = getattr(batch, name).copy()
        assert np.isnan(filled[name][batch.num_live_tokens :].astype(np.float32)).all()
        filled[name][batch.num_live_tokens :] = 1.0
    assert_changes_nothing(batch.replace(**filled), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sequence_does_not_notice_its_neighbours(layout):
    """Alone or among others, first or last, a sequence gets the same bits."""
    batch = make_batch(layout)
    out, _ = run_unchanged(layout)
    sequence = 4
    rows = rows_of(batch, sequence)
    num_rows = rows.stop - rows.start
    alone = {"distribution": np.array([0, 0, 1], np.int32)}
    for name in ("queries", "keys", "values"):
        alone[name] = np.full_like(getattr(batch, name), np.nan)
        alone[name][:num_rows] = getattr(batch, name)[rows]
    alone["kv_lens"] = np.full_like(batch.kv_lens, -1)
    alone["kv_lens"][0] = batch.kv_lens[sequence]
    alone["cu_q_lens"] = np.full_like(batch.cu_q_lens, -1)
    alone["cu_q_lens"][:2] = 0, num_rows
    table = np.full_like(batch.page_table, INT_MAX)
    table[0] = batch.page_table[sequence]
    alone["page_indices"] = table.reshape(-1)
    alone_out, _ = run_changed(batch.replace(**alone))
    assert_same_bits(alone_out[:num_rows], out[rows])

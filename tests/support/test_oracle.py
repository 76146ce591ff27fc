"""The oracle against arithmetic done by hand, and the hostility of the batches."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jax_kernels.ragged_paged_attention as rpa
from tests.support import oracle
from tests.support.ragged_batches import make_ragged_batch


def one_sequence(**changes) -> dict[str, Any]:
    """Head_dim 64, 1 head, pages of 8. Position 0 is old, 1 and 2 are new.

    Lane 0 of the keys is 0, ln 2, ln 4 and of the values 1, 10, 100; all else is 0.
    Both queries have 1 in lane 0, so the weights are in proportion 1 : 2 : 4.
    """
    batch = make_ragged_batch(
        [(2, 3)], num_q_heads=1, num_kv_heads=1, page_size=8, max_sequences=1
    )
    arguments = dict(
        queries=np.zeros((2, 1, 64), np.float32),
        keys=np.zeros((2, 1, 64), np.float32),
        values=np.zeros((2, 1, 64), np.float32),
        kv_cache=np.zeros((4, 1, 8, 1, 128), np.float32),
        kv_lens=np.array([3]),
        page_indices=np.array([2, -1]),
        cu_q_lens=np.array([0, 2]),
        distribution=np.array([0, 0, 1]),
    )
    assert batch.kv_cache.shape[1:] == arguments["kv_cache"].shape[1:]
    arguments["queries"][:, 0, 0] = 1
    arguments["keys"][:, 0, 0] = math.log(2), math.log(4)
    arguments["values"][:, 0, 0] = 10, 100
    arguments["kv_cache"][2, 0, 0, 0, 64] = 1  # value of position 0 in page 2
    return arguments | changes


def lane_zero(expected):
    return expected.out[:, 0, 0]


def test_causal_attention_by_hand():
    expected = oracle.ragged_paged_attention(**one_sequence())
    # Position 1 sees 0 and 1; position 2 sees all.
    want = [(1 * 1 + 2 * 10) / 3, (1 * 1 + 2 * 10 + 4 * 100) / 7]
    np.testing.assert_allclose(lane_zero(expected), want, rtol=1e-7)
    np.testing.assert_array_equal(expected.out[..., 1:], 0)


def test_full_attention_by_hand():
    expected = oracle.ragged_paged_attention(**one_sequence(), causal=False)
    np.testing.assert_allclose(lane_zero(expected), [421 / 7, 421 / 7], rtol=1e-7)


def test_sliding_window_of_one_sees_only_itself():
    expected = oracle.ragged_paged_attention(**one_sequence(), sliding_window=1)
    np.testing.assert_allclose(lane_zero(expected), [10, 100], rtol=1e-7)


def test_sliding_window_without_causality_still_sees_the_future():
    expected = oracle.ragged_paged_attention(
        **one_sequence(), sliding_window=1, causal=False
    )
    want = [(2 * 10 + 4 * 100) / 6, 100]
    np.testing.assert_allclose(lane_zero(expected), want, rtol=1e-7)


def test_sink_takes_weight_and_gives_no_value():
    arguments = one_sequence(sinks=np.array([math.log(3)]))
    expected = oracle.ragged_paged_attention(**arguments)
    np.testing.assert_allclose(lane_zero(expected), [21 / 6, 421 / 10], rtol=1e-7)


def test_soft_cap_bounds_the_scores():
    expected = oracle.ragged_paged_attention(**one_sequence(), soft_cap=1e-9)
    np.testing.assert_allclose(lane_zero(expected), [11 / 2, 111 / 3], rtol=1e-6)


def test_scale_multiplies_scores():
    expected = oracle.ragged_paged_attention(**one_sequence(), sm_scale=2.0)
    want = [(1 + 4 * 10) / 5, (1 + 4 * 10 + 16 * 100) / 21]
    np.testing.assert_allclose(lane_zero(expected), want, rtol=1e-7)


def test_value_scale_divides_what_is_stored_and_multiplies_what_is_read():
    expected = oracle.ragged_paged_attention(**one_sequence(), v_scale=4.0)
    assert expected.kv_cache[2, 0, 1, 0, 64] == 10 / 4
    # The old value was stored as 1, so it means 4.
    want = [(4 + 2 * 10) / 3, (4 + 2 * 10 + 4 * 100) / 7]
    np.testing.assert_allclose(lane_zero(expected), want, rtol=1e-7)


def test_only_the_new_slots_of_the_cache_change():
    arguments = one_sequence()
    expected = oracle.ragged_paged_attention(**arguments)
    changed = np.argwhere(expected.kv_cache != arguments["kv_cache"])
    # Page 2, head 0, slots 1 and 2: lane 0 of the key, lane 64 of the value.
    assert changed.tolist() == [
        [2, 0, slot, 0, lane] for slot in (1, 2) for lane in (0, 64)
    ]


def test_magnitude_sums_absolute_terms():
    arguments = one_sequence()
    arguments["values"][:, 0, 0] = -10, 100
    expected = oracle.ragged_paged_attention(**arguments)
    np.testing.assert_allclose(lane_zero(expected), [-19 / 3, 381 / 7], rtol=1e-7)
    magnitude = expected.magnitude[:, 0, 0]
    np.testing.assert_allclose(magnitude, [21 / 3, 421 / 7], rtol=1e-7)


@pytest.mark.parametrize(
    "dtype, numbers, stored",
    [
        ("int8", [0.5, 1.5, 2.5, -0.5, 1e9, -1e9], [0, 2, 2, 0, 127, -128]),
        ("float8_e4m3fn", [1e9, -1e9, 449.0, 17.0], [448, -448, 448, 16]),
        ("float8_e5m2", [1e9, -1e9, 9.0], [57344, -57344, 8]),
        ("bfloat16", [257.0, 259.0], [256, 260]),
    ],
)
def test_stored_numbers_are_clipped_and_rounded_to_even(dtype, numbers, stored):
    got = oracle.store(np.array(numbers), jnp.dtype(dtype), None)
    np.testing.assert_array_equal(got.astype(np.float64), stored)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("head_dim", [40, 96])
def test_everything_that_is_dead_is_hostile(dtype, head_dim):
    sequences = [(1, 17), (0, 9), (5, 33), (3, 3)]
    batch = make_ragged_batch(sequences, cache_dtype=dtype, head_dim=head_dim)
    assert np.isnan(batch.queries[9:]).all() and np.isnan(batch.keys[9:]).all()
    assert np.isfinite(batch.queries[:9]).all()
    assert batch.distribution.tolist() == [1, 1, 4]
    # 2 + 0 + 3 + 1 live pages; the sequence without queries has none.
    live = batch.page_table[[0, 2, 3]][[0, 0, 1, 1, 1, 2], [0, 1, 0, 1, 2, 0]]
    assert len(set(live.tolist())) == 6
    assert not np.isin(batch.page_table[1], np.arange(len(batch.kv_cache))).any()
    if dtype == "int8":
        return
    # Old tokens 16, 28 and 0 of 2 heads, a key and a value each.
    rows = batch.kv_cache.reshape(-1, 128).astype(np.float32)
    num_live = 44 * 2 * (1 if head_dim <= 64 else 2)
    assert np.isfinite(rows).all(axis=1).sum() == num_live
    assert (~np.isfinite(rows)).all(axis=1).sum() == len(rows) - num_live


def test_shared_prefix_pages_are_shared_only_when_full_and_old():
    batch = make_ragged_batch(
        [(1, 40), (8, 40), (9, 40), (1, 10)], shared_prefix_pages=2, page_size=16
    )
    first = batch.page_table[:4, :2].tolist()
    assert first[0] == first[1]
    assert not set(first[0]) & set(first[2]) and first[3][0] not in first[0]


def test_batches_are_valid_in_value():
    batch = make_ragged_batch(
        [(1, 40), (1, 1), (16, 48), (16, 16), (0, 7), (0, 0), (7, 33)],
        shared_prefix_pages=1,
        distribution=(2, 4, 7),
    )
    rpa.ragged_paged_attention_reference(
        *batch.jax_arguments, chunk_prefill_size=16, validate=True
    )

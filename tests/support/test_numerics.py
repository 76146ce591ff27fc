"""The budgets reject small mistakes, and the cache comparison sees single bits."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import numerics, oracle
from tests.support.ragged_batches import make_ragged_batch

OPTIONS: dict[str, Any] = {"sm_scale": 0.125}


def batch_and_output(dtype, **changes):
    """A batch, and what an emulated kernel with changed options makes of it."""
    batch = make_ragged_batch([(1, 70), (1, 33), (20, 40)], q_dtype=dtype)
    cache = oracle.ragged_paged_attention(*batch.arguments).kv_cache
    emulated, _ = numerics.emulate_low_precision(
        batch.queries, cache, *batch.arguments[4:], **(OPTIONS | changes)
    )
    return batch, emulated.astype(jnp.dtype(dtype)), cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_emulation_is_within_its_own_budget(dtype):
    batch, out, cache = batch_and_output(dtype)
    numerics.assert_matches_oracle(out, cache, batch.arguments, **OPTIONS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "mistake",
    [
        {"causal": False},
        {"sliding_window": 69},  # one key of the longest sequence is lost
        {"sm_scale": 0.125 * 1.05},
        {"soft_cap": 5.0},
        {"v_scale": 1.02},
    ],
    ids=str,
)
def test_a_small_mistake_exceeds_the_budget(dtype, mistake):
    batch, out, cache = batch_and_output(dtype, **mistake)
    with pytest.raises(AssertionError, match="budget"):
        numerics.assert_matches_oracle(out, cache, batch.arguments, **OPTIONS)


@pytest.mark.parametrize("value", [1e-30, np.nan, np.inf])
def test_padding_rows_must_be_exactly_zero(value):
    batch, out, cache = batch_and_output("float32")
    out[batch.num_live_tokens :, 0, 0] = value
    with pytest.raises(AssertionError, match=r"exceed|non-finite"):
        numerics.assert_matches_oracle(out, cache, batch.arguments, **OPTIONS)


def test_one_bit_of_the_cache_is_noticed_and_located():
    _, _, cache = batch_and_output("bfloat16")
    wrong = cache.copy()
    wrong.view(np.uint16)[2, 1, 3, 1, 5] ^= 1
    with pytest.raises(AssertionError, match="page 2, head 1, slot 7, lane 5"):
        numerics.assert_same_bytes(wrong, cache)


def test_signs_of_zeros_and_payloads_of_nans_are_compared():
    zeros = np.zeros((1, 1, 8, 1, 128), np.float32)
    with pytest.raises(AssertionError, match="differ"):
        numerics.assert_same_bytes(-zeros, zeros)
    nans = np.full_like(zeros, np.nan)
    numerics.assert_same_bytes(nans, nans.copy())
    with pytest.raises(AssertionError, match="differ"):
        numerics.assert_same_bytes(-nans, nans)


def test_caches_of_other_shape_or_dtype_differ():
    cache = np.zeros((1, 1, 8, 1, 128), np.float32)
    with pytest.raises(AssertionError, match="shape"):
        numerics.assert_same_bytes(cache[:, :, :4], cache)
    with pytest.raises(AssertionError, match="dtype"):
        numerics.assert_same_bytes(cache.view(np.int32), cache)

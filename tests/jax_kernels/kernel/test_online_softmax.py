"""The running softmax equals the softmax of everything at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_kernels import chips
from jax_kernels.ragged_paged_attention import numerics
from jax_kernels.ragged_paged_attention.config import AttentionSpec
from jax_kernels.ragged_paged_attention.kernel import online_softmax
from jax_kernels.ragged_paged_attention.kernel.online_softmax import SoftmaxState

ROWS, LANES = 8, 128
F32_EPS = np.finfo(np.float32).eps


def numerics_of(dtype: str = "float32", **spec) -> numerics.Numerics:
    """With queries and cache of one dtype."""
    return numerics.choose(
        AttentionSpec(**spec),
        chips.UNKNOWN,
        q_dtype=jnp.dtype(dtype),
        cache_dtype=jnp.dtype(dtype),
        lanes=LANES,
    )


def first_state(sink=None) -> SoftmaxState:
    """Before any key; a sink is one key with a zero value."""
    m = online_softmax.NO_KEY_MAX if sink is None else sink
    return SoftmaxState(
        m=jnp.full((ROWS, LANES), m, jnp.float32),
        l=jnp.full((ROWS, LANES), 0.0 if sink is None else 1.0, jnp.float32),
        acc=jnp.zeros((ROWS, LANES), jnp.float32),
    )


def fold(state: SoftmaxState, scores, values, *, with_ones=False) -> SoftmaxState:
    p, m, correction = online_softmax.probabilities(jnp.asarray(scores), state.m)
    v = jnp.asarray(values)
    if with_ones:
        v = online_softmax.with_ones(v)
    total, acc = online_softmax.accumulate(
        p, v, correction, state.l, state.acc, v.dtype
    )
    return online_softmax.whole_sums(SoftmaxState(m, total, acc))


def dense(scores, values, sink=None):
    """Output and size of its terms, in float64; scores in units of log2."""
    scores, values = scores.astype(np.float64), values.astype(np.float64)
    if sink is not None:
        scores = np.concatenate([scores, np.full((ROWS, 1), sink)], axis=1)
        values = np.concatenate([values, np.zeros((1, LANES))])
    largest = scores.max(axis=1, keepdims=True)
    weights = np.exp2(scores - np.where(np.isneginf(largest), 0, largest))
    total = weights.sum(axis=1, keepdims=True)
    weights = weights / np.where(total == 0, 1, total)
    return weights @ values, weights @ abs(values)


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.sampled_from([1, 8, 32, 128, 256]), min_size=1, max_size=6),
    sink=st.none() | st.floats(-30, 30, width=32),
    spread=st.sampled_from([1.0, 30.0, 1000.0]),
    masked_share=st.sampled_from([0.0, 0.3, 0.9]),
    with_ones=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_folding_any_partition_equals_the_dense_softmax(
    sizes, sink, spread, masked_share, with_ones, seed
):
    rng = np.random.default_rng(seed)
    num_keys = sum(sizes)
    scores = (rng.standard_normal((ROWS, num_keys)) * spread).astype(np.float32)
    scores[rng.random(scores.shape) < masked_share] = online_softmax.MASKED_SCORE
    values = rng.standard_normal((num_keys, LANES)).astype(np.float32)
    state, begin = first_state(sink), 0
    for size in sizes:
        part = slice(begin, begin + size)
        state = fold(state, scores[:, part], values[part], with_ones=with_ones)
        begin += size
    out = np.asarray(online_softmax.normalise(state, 1.0))
    expected, magnitude = dense(scores, values, sink)
    # exp2 of a difference of scores s errs by s * eps: half a bit per unit of score.
    bound = 4 * F32_EPS * (num_keys + 8 + 8 * spread) * magnitude
    assert (abs(out - expected) <= bound + 1e-37).all()


@pytest.mark.parametrize("with_ones", [False, True], ids=["vector_sum", "matrix_sum"])
def test_two_keys_by_hand(with_ones):
    """Scores 0 and 1 weigh 1 and 2: (1 * 3 + 2 * 6) / 3 = 5, in one block or in two."""
    scores = np.tile(np.array([0.0, 1.0], np.float32), (ROWS, 1))
    values = np.tile(np.array([[3.0], [6.0]], np.float32), (1, LANES))
    at_once = fold(first_state(), scores, values, with_ones=with_ones)
    state = fold(first_state(), scores[:, :1], values[:1], with_ones=with_ones)
    in_turn = fold(state, scores[:, 1:], values[1:], with_ones=with_ones)
    for state in (at_once, in_turn):
        np.testing.assert_array_equal(online_softmax.normalise(state, 1.0), 5.0)
        np.testing.assert_array_equal(state.l, 1.5)


def test_a_row_without_a_visible_key_gives_zeros():
    """Rule 6: neither the mean of the values nor NaN."""
    scores = np.full((ROWS, 8), online_softmax.MASKED_SCORE, np.float32)
    values = np.ones((8, LANES), np.float32)
    for sink in (None, 2.0):
        state = fold(first_state(sink), scores, values)
        np.testing.assert_array_equal(online_softmax.normalise(state, 1.0), 0.0)


def test_rows_that_are_masked_first_and_live_later_are_right():
    scores = np.zeros((ROWS, 8), np.float32)
    values = np.full((8, LANES), 7.0, np.float32)
    masked = np.full_like(scores, online_softmax.MASKED_SCORE)
    state = fold(first_state(), masked, 100 * values)
    state = fold(state, scores, values)
    state = fold(state, masked, 100 * values)
    np.testing.assert_array_equal(online_softmax.normalise(state, 1.0), 7.0)


def test_a_sink_takes_its_share_of_the_weight():
    """One key of score 3 and a sink of score 3: half of the value is left."""
    scores = np.full((ROWS, 1), 3.0, np.float32)
    values = np.full((1, LANES), 8.0, np.float32)
    state = fold(first_state(sink=3.0), scores, values)
    np.testing.assert_array_equal(online_softmax.normalise(state, 1.0), 4.0)
    np.testing.assert_array_equal(online_softmax.normalise(state, 0.5), 2.0)


@pytest.mark.parametrize("sink, left", [(np.inf, 0.0), (3e38, 0.0), (-np.inf, 8.0)])
@pytest.mark.parametrize("with_masked_block", [False, True])
def test_infinite_sinks_take_everything_or_nothing(sink, left, with_masked_block):
    """Also where a block comes first of which a row sees no key."""
    sink = online_softmax.sink_logit(jnp.float32(sink))
    assert np.isfinite(sink)
    scores = np.full((ROWS, 1), 3.0, np.float32)
    values = np.full((1, LANES), 8.0, np.float32)
    state = first_state(sink)
    if with_masked_block:
        state = fold(state, np.full_like(scores, online_softmax.MASKED_SCORE), values)
    state = fold(state, scores, values)
    np.testing.assert_array_equal(online_softmax.normalise(state, 1.0), left)


def test_the_logit_of_a_sink_is_in_units_of_log2():
    logits = online_softmax.sink_logit(jnp.array([0.0, 1.0, -5.0], jnp.float32))
    np.testing.assert_allclose(logits, np.log2(np.e) * np.array([0.0, 1.0, -5.0]))


@pytest.mark.parametrize("lanes", [128, 256])
def test_wide_values_use_the_same_weights(lanes):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((ROWS, 32)).astype(np.float32)
    values = rng.standard_normal((32, lanes)).astype(np.float32)
    state = first_state()._replace(acc=jnp.zeros((ROWS, lanes), jnp.float32))
    out = online_softmax.normalise(fold(state, scores, values), 1.0)
    weights = np.exp2(scores.astype(np.float64))
    expected = weights @ values / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize(
    "q_dtype, k_dtype", [("float32", "float32"), ("bfloat16", "bfloat16")]
)
def test_scores_are_products_in_float32(q_dtype, k_dtype):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((ROWS, LANES)).astype(jnp.dtype(q_dtype))
    k = rng.standard_normal((32, LANES)).astype(jnp.dtype(k_dtype))
    scores = online_softmax.score_tile(jnp.asarray(q), jnp.asarray(k), numerics_of())
    assert scores.dtype == jnp.float32
    expected = q.astype(np.float64) @ k.astype(np.float64).T
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_integers_are_multiplied_exactly():
    rng = np.random.default_rng(0)
    q, k = (rng.integers(-128, 128, (n, LANES)).astype(np.int8) for n in (ROWS, 32))
    values = numerics_of("int8", q_scale=1.0, sm_scale=float(np.log(2.0)))
    scores = online_softmax.score_tile(jnp.asarray(q), jnp.asarray(k), values)
    # sm_scale * log2(e) = 1
    expected = q.astype(np.int64) @ k.astype(np.int64).T
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_a_soft_cap_bounds_the_scores():
    """Scores arrive in units of the cap and leave in units of log2."""
    q = jnp.full((ROWS, LANES), 1.0, jnp.float32)
    k = jnp.full((32, LANES), 0.5 / LANES, jnp.float32)
    scores = online_softmax.score_tile(q, k, numerics_of(soft_cap=5.0))
    expected = 5.0 * np.tanh(0.5) * np.log2(np.e)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def add_anchored(state: SoftmaxState, scores, values, *, is_first) -> SoftmaxState:
    """One more block at the anchor, which the first one fixes."""
    anchor = online_softmax.anchor(jnp.asarray(scores), state.m)
    m = anchor if is_first else state.m
    p = online_softmax.probabilities_at(jnp.asarray(scores), m)
    v = jnp.asarray(values)
    row_sum, weighted = online_softmax.sum_and_weigh(p, v, LANES, v.dtype)
    return SoftmaxState(m, state.l + row_sum, state.acc + weighted)


@pytest.mark.parametrize("shift", [-5000.0, -40.0, 0.0, 20.0, 31.0])
def test_any_anchor_gives_the_same_softmax_within_range(shift):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, ROWS, 128)).astype(np.float32) * 3
    scores[1] += shift
    values = rng.normal(size=(2, 128, LANES)).astype(np.float32)
    state = first_state()
    for index in range(2):
        state = add_anchored(state, scores[index], values[index], is_first=index == 0)
    assert np.isfinite(np.asarray(state.acc)).all()
    state = online_softmax.whole_sums(state)
    expected, magnitude = dense(np.concatenate(scores, 1), np.concatenate(values))
    out = np.asarray(online_softmax.normalise(state, 1.0))
    assert (abs(out - expected) <= 1e-5 * magnitude).all()


@pytest.mark.parametrize(
    "above, is_lost", [(0.0, False), (40.0, False), (80.0, True), (1000.0, True)]
)
def test_sums_out_of_range_are_seen(above, is_lost):
    scores = np.full((ROWS, 128), above, np.float32)
    state = first_state()._replace(m=jnp.zeros((ROWS, LANES)))
    state = add_anchored(state, scores, np.ones((128, LANES), np.float32), is_first=0)
    assert bool(online_softmax.are_in_range(state.l)) == (above == 0.0)
    assert (np.asarray(online_softmax.is_lost(state.l)) == is_lost).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_one_sum_that_is_no_number_is_out_of_range(poison):
    sums = np.ones((8, LANES), np.float32)
    sums[3, 5] = poison
    assert not online_softmax.are_in_range(jnp.asarray(sums))


@pytest.mark.parametrize("m", [0.0, 1e9, online_softmax.SINK_MAX])
def test_renormalised_rows_are_the_same(m):
    total = np.tile(np.array([0.5, 1, 1.5, 2.0**40], np.float32), ROWS)[:ROWS, None]
    state = SoftmaxState(
        m=jnp.full((ROWS, LANES), m, jnp.float32),
        l=jnp.asarray(np.tile(total, LANES)),
        acc=jnp.asarray(3 * np.tile(total, LANES)),
    )
    new = online_softmax.renormalised(state)
    np.testing.assert_allclose(online_softmax.normalise(new, 1.0), 3.0, rtol=1e-6)
    moved = np.asarray(new.m, np.float64) - m
    np.testing.assert_allclose(new.l, state.l / 2.0**moved, rtol=1e-5)
    if m == 0.0:
        assert np.asarray(new.l).max() <= 1.01


@pytest.mark.parametrize("keys", [32, 128, 384])
def test_spread_sums_have_the_sum_as_their_mean_and_no_larger_one(keys):
    p = np.random.default_rng(0).uniform(size=(ROWS, keys)).astype(np.float32)
    p[0] = 0.0
    p[0, 7] = 3.0
    spread = online_softmax.spread_sums(jnp.asarray(p))
    assert spread.shape == (ROWS, LANES)
    total = p.sum(axis=1, dtype=np.float64)
    state = first_state()._replace(l=spread)
    whole = np.asarray(online_softmax.whole_sums(state).l)
    np.testing.assert_allclose(whole, np.tile(total[:, None], LANES), rtol=1e-6)
    assert (np.asarray(spread).max(axis=1) >= total * (1 - 1e-6)).all()


@pytest.mark.parametrize("dtype, packing", [("float32", 1), ("bfloat16", 2)])
def test_whatever_an_unseen_key_has_becomes_zero(dtype, packing):
    rng = np.random.default_rng(0)
    p = rng.uniform(size=(16, LANES)).astype(np.float32)
    is_seen = rng.uniform(size=p.shape) < 0.5
    p[~is_seen] = rng.choice([np.nan, np.inf, -np.inf, 2.0], size=(~is_seen).sum())
    # The first of the rows that share a word has its low bits.
    ones = np.uint64(2 ** (32 // packing) - 1)
    bits = np.where(is_seen, ones, 0).astype(np.uint64)
    places = [bits[i::packing] << np.uint64(32 // packing * i) for i in range(packing)]
    words = np.bitwise_or.reduce(places)
    seen = jax.jit(online_softmax.only_visible)(
        jnp.asarray(p, dtype), jnp.asarray(words.astype(np.uint32))
    )
    expected = np.where(is_seen, np.asarray(jnp.asarray(p, dtype), np.float32), 0.0)
    np.testing.assert_array_equal(np.asarray(seen, np.float32), expected)
    assert seen.dtype == dtype


@pytest.mark.parametrize("multiplier", [1.0, 0.37, -0.37])
def test_float8_probabilities_are_rounded_and_their_sum_is_theirs(multiplier):
    float8 = jnp.dtype(jnp.float8_e4m3fn)
    values = dataclasses.replace(
        numerics_of(),
        float8_probabilities=float8,
        exponent_multiplier=multiplier,
    )
    rng = np.random.default_rng(0)
    exponents = rng.uniform(-20.0, 8.0, (ROWS, 256)).astype(np.float32)
    scores = (exponents + 5.0) / multiplier
    m = jnp.full((ROWS, LANES), 5.0 / multiplier, jnp.float32)
    p = online_softmax.float8_probabilities_at(jnp.asarray(scores), m, values)
    assert p.dtype == float8
    rounded, exact = np.asarray(p, np.float64), np.exp2(exponents.astype(np.float64))
    # To bfloat16: the exponent, the multiplier and their product, and exp2 of it.
    relative = abs(exponents) * 3 * 2.0**-8 * np.log(2) + 2.0**-8
    bound = exact * relative * 1.1
    bound += np.maximum((exact + bound) * 2.0**-4, 2.0**-10)
    assert (abs(rounded - exact) <= bound).all()
    sums = np.asarray(online_softmax.sum_float8(p)).sum(axis=1)
    np.testing.assert_allclose(sums, rounded.sum(axis=1), rtol=2.0**-8)


def test_a_probability_that_is_too_large_for_float8_loses_its_row_alone():
    p = np.ones((ROWS, 256), np.float32)
    p[3, 200] = 500.0
    sums = online_softmax.sum_float8(jnp.asarray(p).astype(jnp.float8_e4m3fn))
    row_sums = jnp.broadcast_to(sums.sum(axis=1, keepdims=True), sums.shape)
    is_lost = np.asarray(online_softmax.is_lost(row_sums))
    assert (is_lost[3] == 1.0).all()
    assert is_lost.sum() == LANES
    assert not online_softmax.are_in_range(sums)

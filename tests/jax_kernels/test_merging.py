"""Parts of the keys, joined again, in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_kernels.ragged_paged_attention import (
    merge_attention,
    ragged_paged_attention_reference,
)
from tests.support.ragged_batches import make_ragged_batch

INFINITY = float("inf")


def test_keys_of_the_cache_and_new_keys_are_all_keys():
    batch = make_ragged_batch([(1, 17), (1, 1), (5, 5), (9, 40)], with_sinks=True)
    arguments = batch.jax_arguments
    options = {"sm_scale": 0.1, "return_lse": True}
    *whole, _ = ragged_paged_attention_reference(*arguments, **options)
    *old, _ = ragged_paged_attention_reference(
        *arguments[:-1], attend="cache", **options
    )
    *new, _ = ragged_paged_attention_reference(*arguments, attend="new", **options)
    merged = merge_attention(*zip(old, new, strict=True))
    live = slice(0, batch.num_live_tokens)
    for got, expected in zip(merged, whole, strict=True):
        np.testing.assert_allclose(got[live], expected[live], rtol=1e-5, atol=1e-5)


def test_infinite_logarithms():
    outs = [jnp.array([[2.0], [0.0], [0.0], [3.0]]), jnp.zeros((4, 1))]
    lses = [
        jnp.array([1.0, -INFINITY, -INFINITY, 1.0]),
        jnp.array([-INFINITY, -INFINITY, INFINITY, INFINITY]),
    ]
    out, lse = merge_attention(outs, lses)
    assert out[:, 0].tolist() == [2.0, 0.0, 0.0, 0.0]
    assert lse.tolist() == [1.0, -INFINITY, INFINITY, INFINITY]


def test_gradients_are_those_of_a_softmax_also_of_equal_parts():
    outs = jnp.arange(12.0).reshape(2, 2, 3)
    lses = jnp.array([[0.5, 0.5], [0.5, 2.0]])

    def plain(lses):
        shares = jax.nn.softmax(lses, axis=0)
        return (shares[..., None] * outs).sum(0), jax.nn.logsumexp(lses, axis=0)

    def gradient(merge):
        return jax.grad(lambda x: sum(y.sum() for y in merge(x)))(lses)

    got = gradient(lambda x: merge_attention(outs, x))
    expected = gradient(plain)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_parts_of_other_dtypes_are_refused():
    with pytest.raises(NotImplementedError, match=r"outs of int32 .* cast them"):
        merge_attention([jnp.ones((2, 4), jnp.int32)], [jnp.ones(2)])


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "at least one, got 0 and 0"),
        ([jnp.ones((2, 4)), jnp.ones((3, 4))], [jnp.ones(2)] * 2, r"outs\[1\] must be"),
        ([jnp.ones((2, 4))], [jnp.ones((2, 1))], r"lses\[0\] must be float32 \[2\]"),
    ],
)
def test_what_does_not_fit_is_named(outs, lses, message):
    with pytest.raises(ValueError, match=message):
        merge_attention(outs, lses)

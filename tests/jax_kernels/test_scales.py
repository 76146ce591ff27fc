"""Factors of key heads from scales that are arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_kernels.ragged_paged_attention import scales
from jax_kernels.ragged_paged_attention.numerics import HeadFactor


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_inverses_are_rounded_to_nearest(run):
    """As float64 gives them, which has more than twice as many bits."""
    rng = np.random.default_rng(0)
    powers = np.exp2(np.arange(-120, 121)).astype(np.float32)
    x = np.concatenate(
        [
            np.exp2(rng.uniform(-120, 120, 100_000)).astype(np.float32),
            powers,
            np.nextafter(powers[1:], np.float32(0)),
            np.nextafter(powers[:-1], np.float32(np.inf)),
        ]
    )
    got = np.asarray(run(scales.reciprocal)(x))
    np.testing.assert_array_equal(got, (1 / x.astype(np.float64)).astype(np.float32))


def test_a_factor_is_a_product_of_scales_or_an_inverse():
    of_heads = {"q_scale": jnp.array([2.0, 4.0]), "k_scale": jnp.array([0.5, 8.0])}
    factors = (
        HeadFactor("score", 3.0, ("q_scale", "k_scale")),
        HeadFactor("key", 1.0, ("k_scale",), is_inverse=True),
    )
    got = scales.head_factors(
        factors, {k: jax.numpy.asarray(v) for k, v in of_heads.items()}
    )
    np.testing.assert_array_equal(got, [3, 96, 2, 0.125])
    assert scales.head_factors((), {}) is None

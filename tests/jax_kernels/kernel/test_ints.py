"""Plain ints give plain ints at once; traced ones give the same numbers."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_kernels.ragged_paged_attention.kernel import ints

NUMBERS = (-129, -128, -3, -1, 0, 1, 2, 7, 8, 70_000)
POWERS = (1, 2, 8, 128)
BINARY = {
    "minimum": ints.minimum,
    "maximum": ints.maximum,
    "where_less": lambda x, y: ints.where(x < y, x + 1, 5),
    "where_both": lambda x, y: ints.where((x < 8) & (y == 1), x, y),
    "where_either": lambda x, y: ints.where((x < 0) | (y < 0), 1, 0),
}


@pytest.mark.parametrize("name", BINARY)
def test_plain_and_traced_numbers_give_the_same(name):
    function = BINARY[name]
    pairs = [(x, y) for x in NUMBERS for y in NUMBERS]
    plain = [function(x, y) for x, y in pairs]
    assert {type(number) for number in plain} == {int}
    traced = jax.jit(jax.vmap(function))(*jnp.array(pairs, jnp.int32).T)
    assert traced.dtype == jnp.int32
    assert traced.tolist() == plain


def test_one_traced_number_is_enough_to_trace():
    mixed = jax.jit(lambda x: (ints.minimum(x, 3), ints.maximum(3, x)))
    assert [int(x) for x in mixed(5)] == [3, 5]


def test_a_condition_that_is_known_adds_no_code():
    def choose(x):
        return ints.where(True, x, x + 1), ints.where(1 > 2, x + 1, 7)

    assert choose(3) == (3, 7)
    primitives = [eqn.primitive.name for eqn in jax.make_jaxpr(choose)(3).eqns]
    # The other branch is built by the caller and dropped; nothing selects.
    assert set(primitives) <= {"add"}


@pytest.mark.parametrize("divisor", [1, 3, 32])
def test_division_rounds_up(divisor):
    numbers = range(100)
    plain = [ints.ceil_div(number, divisor) for number in numbers]
    assert plain == [-(-number // divisor) for number in numbers]
    traced = jax.jit(jax.vmap(lambda x: ints.ceil_div(x, divisor)))
    assert traced(jnp.arange(100)).tolist() == plain


@given(st.integers(-1000, 1000), st.sampled_from(POWERS))
def test_rounding_is_exact_below_zero_too(value, power):
    assert ints.floor_to(value, power) == value // power * power
    assert ints.ceil_to(value, power) == -(-value // power) * power


@pytest.mark.parametrize("power", POWERS)
def test_the_logarithm_is_the_shift_of_the_power(power):
    assert 1 << ints.log2(power) == power

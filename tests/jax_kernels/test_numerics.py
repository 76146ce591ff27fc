"""In which dtypes numbers meet, and by which factors."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_kernels import chips
from jax_kernels.ragged_paged_attention import numerics
from jax_kernels.ragged_paged_attention.config import AttentionSpec


def numerics_of(
    *,
    chip=chips.UNKNOWN,
    q_dtype="bfloat16",
    cache_dtype="bfloat16",
    lanes=128,
    **spec,
) -> numerics.Numerics:
    attention = AttentionSpec(**spec)
    return numerics.choose(
        attention,
        chip,
        q_dtype=jnp.dtype(q_dtype),
        cache_dtype=jnp.dtype(cache_dtype),
        lanes=lanes,
        array_options=attention.array_options,
    )


SPEC_OPTIONS = [
    {},
    {"soft_cap": 5.0},
    {"k_scale": 0.25},
    {"q_scale": 0.5, "k_scale": 0.25},
    {"q_scale": 0.5, "soft_cap": 5.0},
]


@pytest.mark.parametrize("options", SPEC_OPTIONS, ids=str)
def test_the_two_multipliers_hold_every_factor_of_the_score_once(options):
    """exp(sm_scale * q . k) is exp2 of the product in units of log2; a soft cap takes
    its argument in units of the cap. q stands for stored q times q_scale."""
    values = numerics_of(sm_scale=0.125, **options)
    unit = 1 / options["soft_cap"] if "soft_cap" in options else math.log2(math.e)
    expected = 0.125 * options.get("k_scale", 1.0) * unit
    product = values.query_multiplier * values.score_multiplier
    product *= values.quantised_multiplier
    assert product == pytest.approx(expected, rel=1e-12)


def test_queries_that_are_quantised_take_no_other_factor():
    """Otherwise the factor would change what is clipped."""
    values = numerics_of(sm_scale=0.125, q_scale=0.5, k_scale=3.0)
    assert values.query_multiplier == 2.0
    assert numerics_of(sm_scale=0.125).score_multiplier == 1.0


def test_a_soft_cap_is_kept_in_units_of_log2():
    assert numerics_of().score_cap is None
    assert numerics_of(soft_cap=5.0).score_cap == 5.0 * math.log2(math.e)


@pytest.mark.parametrize(
    "chip, lanes, dtype, expected",
    [
        (chips.TPU7X, 128, "bfloat16", True),
        (chips.V6E, 128, "bfloat16", True),
        (chips.TPU7X, 256, "bfloat16", False),
        (chips.V5E, 128, "bfloat16", False),
        (chips.TPU7X, 128, "float32", False),
    ],
)
def test_matrix_units_sum_where_they_are_wider_than_values(
    chip, lanes, dtype, expected
):
    values = numerics_of(chip=chip, lanes=lanes, q_dtype=dtype)
    assert values.sums_in_matrix_unit == expected


@pytest.mark.parametrize(
    "q_dtype, cache_dtype, q_scale, multiply, value",
    [
        ("bfloat16", "float8_e4m3fn", 0.5, "bfloat16", "bfloat16"),
        ("bfloat16", "bfloat16", None, "bfloat16", "bfloat16"),
        ("float32", "bfloat16", None, "float32", "float32"),
        ("bfloat16", "float32", None, "float32", "float32"),
        ("bfloat16", "float8_e4m3fn", None, "bfloat16", "bfloat16"),
        ("float32", "int8", None, "float32", "float32"),
        ("bfloat16", "int8", 0.5, "int8", "bfloat16"),
    ],
)
def test_multiplications_take_the_wider_dtype_unless_queries_are_int8(
    q_dtype, cache_dtype, q_scale, multiply, value
):
    values = numerics_of(q_dtype=q_dtype, cache_dtype=cache_dtype, q_scale=q_scale)
    assert values.multiply_dtype == jnp.dtype(multiply)
    assert values.value_dtype == jnp.dtype(value)


@pytest.mark.parametrize(
    "cache_dtype, chip, spec, expected",
    [
        ("bfloat16", "v5e", {}, True),
        ("bfloat16", "v5e", {"k_scale": 0.5}, False),
        ("float8_e4m3fn", "v6e", {}, True),
        ("float8_e4m3fn", "v6e", {"v_scale": 0.5}, False),
        ("float8_e4m3fn", "v5e", {}, False),
        ("float8_e4m3fn", "tpu7x", {}, False),
        ("float32", "tpu7x", {}, False),
    ],
)
def test_new_tokens_stay_16_bits_where_nothing_has_to_be_computed_in_more(
    cache_dtype, chip, spec, expected
):
    found = numerics_of(chip=chips.CHIPS[chip], cache_dtype=cache_dtype, **spec)
    assert found.packs_16_bits == expected
    wide = numerics_of(
        chip=chips.CHIPS[chip], q_dtype="float32", cache_dtype=cache_dtype, **spec
    )
    assert not wide.packs_16_bits


def test_the_e4m3_of_v6e_is_a_power_of_two_of_the_usual_one():
    """The factor that the output makes up for, over every finite number."""
    every_byte = np.arange(256, dtype=np.uint8)
    usual = every_byte.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    shifted = every_byte.view(ml_dtypes.float8_e4m3b11fnuz).astype(np.float32)
    is_plain = np.isfinite(usual) & (every_byte != 0x80)
    assert numerics_of(cache_dtype="float8_e4m3fn").output_scale == 1.0
    values = numerics_of(cache_dtype="float8_e4m3fn", chip=chips.V6E)
    assert values.reads_e4m3_shifted
    np.testing.assert_array_equal(
        usual[is_plain], shifted[is_plain] * values.output_scale
    )


@pytest.mark.parametrize("q_scale", [None, 0.5])
def test_a_shift_of_e4m3_multiplies_what_queries_were_rounded_to(q_scale):
    """Otherwise it would change what is clipped."""
    options = {"cache_dtype": "float8_e4m3fn", "q_scale": q_scale}
    shifted, usual = numerics_of(chip=chips.V6E, **options), numerics_of(**options)
    ratio = shifted.query_multiplier / usual.query_multiplier
    assert ratio == (1.0 if q_scale else 16.0)
    assert shifted.quantised_multiplier == (16.0 if q_scale else 1.0)
    assert usual.quantised_multiplier == 1.0
    assert shifted.output_scale == 16.0


@pytest.mark.parametrize(
    "chip, lanes, cache_dtype, probabilities_dtype, expected",
    [
        (chips.TPU7X, 128, "float8_e4m3fn", None, "float8_e4m3fn"),
        (chips.TPU7X, 256, "float8_e4m3fn", None, "bfloat16"),
        (chips.TPU7X, 256, "float8_e4m3fn", "float8_e4m3fn", "float8_e4m3fn"),
        (chips.TPU7X, 256, "int8", None, "int8"),
        (chips.V6E, 128, "float8_e4m3fn", None, "bfloat16"),
        (chips.V6E, 128, "float8_e5m2", None, "float8_e5m2"),
        (chips.V5E, 128, "float8_e4m3fn", None, "bfloat16"),
    ],
)
def test_quantised_queries_meet_keys_as_is_faster(
    chip, lanes, cache_dtype, probabilities_dtype, expected
):
    values = numerics_of(
        chip=chip,
        lanes=lanes,
        cache_dtype=cache_dtype,
        q_scale=0.5,
        probabilities_dtype=probabilities_dtype,
    )
    assert values.quantised_dtype == jnp.dtype(cache_dtype)
    assert values.multiply_dtype == jnp.dtype(expected)


@pytest.mark.parametrize(
    "chip, q_dtype, cache_dtype, scale, in_software, in_16_bits",
    [
        (chips.V6E, "bfloat16", "float8_e4m3fn", None, True, True),
        (chips.V6E, "bfloat16", "float8_e4m3fn", 0.5, True, False),
        (chips.V6E, "float32", "float8_e4m3fn", None, True, False),
        (chips.V6E, "bfloat16", "float8_e5m2", None, False, False),
        (chips.V5E, "bfloat16", "float8_e4m3fn", None, True, False),
        (chips.TPU7X, "bfloat16", "float8_e4m3fn", None, False, False),
    ],
)
@pytest.mark.parametrize("scaled", ["k_scale", "v_scale"])
def test_new_tokens_are_rounded_as_the_chip_can(
    chip, q_dtype, cache_dtype, scale, in_software, in_16_bits, scaled
):
    """A scaled bfloat16 is none any more."""
    values = numerics_of(
        chip=chip, q_dtype=q_dtype, cache_dtype=cache_dtype, **{scaled: scale}
    )
    assert values.rounds_in_software == in_software
    assert values.rounds_in_16_bits == in_16_bits


@pytest.mark.parametrize(
    "chip, lanes, q_dtype, packing",
    [
        (chips.TPU7X, 128, "bfloat16", 2),
        (chips.TPU7X, 256, "bfloat16", 1),
        (chips.TPU7X, 128, "float32", 1),
        (chips.V5E, 128, "bfloat16", 1),
    ],
)
def test_probabilities_are_masked_as_they_are_summed(chip, lanes, q_dtype, packing):
    """In float32 where the vector units sum them."""
    values = numerics_of(chip=chip, lanes=lanes, q_dtype=q_dtype)
    assert values.masked_packing == packing


FLOAT8 = {
    "chip": chips.TPU7X,
    "cache_dtype": "float8_e4m3fn",
    "probabilities_dtype": "float8_e4m3fn",
}


@pytest.mark.parametrize(
    "changes, is_used",
    [
        ({}, True),
        ({"probabilities_dtype": None}, False),
        ({"q_dtype": "float32"}, False),
        ({"chip": chips.V6E}, False),
        ({"chip": chips.V5E}, False),
        ({"sliding_window": 100}, False),
    ],
    ids=str,
)
def test_probabilities_are_float8_where_that_is_allowed_and_faster(changes, is_used):
    values = numerics_of(**FLOAT8 | changes)
    assert (values.float8_probabilities is not None) == is_used
    assert not values.sums_are_parts
    assert values.value_dtype == changes.get("q_dtype", "bfloat16")


def test_sums_of_float8_probabilities_are_parts_where_the_vector_unit_adds_them():
    assert numerics_of(**FLOAT8, lanes=256).sums_are_parts
    assert not numerics_of(lanes=256, chip=chips.TPU7X).sums_are_parts


@pytest.mark.parametrize("sm_scale", [0.125, -0.125, 0.0])
@pytest.mark.parametrize("options", SPEC_OPTIONS, ids=str)
def test_exponents_take_what_is_left_of_the_factors(sm_scale, options):
    """But not what a soft cap needs before, nor zero, by which anchors are divided."""
    values = numerics_of(sm_scale=sm_scale, **FLOAT8, **options)
    is_left = "q_scale" in options and "soft_cap" not in options and sm_scale
    expected = values.score_multiplier if is_left else 1.0
    assert values.exponent_multiplier == expected
    assert numerics_of(sm_scale=sm_scale, **options).exponent_multiplier == 1.0


ARRAYS = [
    ("k_scale", "v_scale"),
    ("q_scale", "k_scale", "v_scale"),
    ("k_scale",),
    ("q_scale",),
]


@pytest.mark.parametrize("arrays", ARRAYS, ids=",".join)
@pytest.mark.parametrize("chip", ["tpu7x", "v6e"])
def test_factors_of_heads_are_the_constants_of_equal_scales(arrays, chip):
    """Each constant becomes a factor, or keeps its value."""
    numbers: dict[str, Any] = {"q_scale": 0.3, "k_scale": 0.7, "v_scale": 3.0}
    options: dict[str, Any] = {"sm_scale": 0.125, "soft_cap": 5.0}
    common: dict[str, Any] = {
        "chip": chips.find_chip(chip),
        "cache_dtype": "float8_e4m3fn",
    }
    given = {name: x for name, x in numbers.items() if name not in arrays}
    got = numerics_of(**common, **options, **given, array_options=arrays)
    expected = numerics_of(**common, **options, **numbers)
    values = {
        factor.name: 1 / numbers[factor.scales[0]]
        if factor.is_inverse
        else factor.constant * math.prod(numbers[name] for name in factor.scales)
        for factor in got.head_factors
    }
    if "q_scale" not in arrays:
        assert "score" in values
    for name, constant in (
        ("query", "query_multiplier"),
        ("score", "score_multiplier"),
        ("key", "key_multiplier"),
        ("value", "value_multiplier"),
        ("output", "output_scale"),
    ):
        kept = getattr(got, constant)
        if name in values:
            assert kept in (None, 1.0)
        value = values.get(name, kept)
        assert value == pytest.approx(getattr(expected, constant), rel=1e-12)
    rest = dataclasses.replace(
        got,
        query_multiplier=expected.query_multiplier,
        score_multiplier=expected.score_multiplier,
        key_multiplier=expected.key_multiplier,
        value_multiplier=expected.value_multiplier,
        output_scale=expected.output_scale,
        head_factors=(),
    )
    assert rest == expected


def test_scales_of_keys_are_folded_into_queries_that_are_not_quantised():
    values = numerics_of(sm_scale=0.125, array_options=("k_scale",))
    (query, key) = values.head_factors
    assert (query.name, query.scales) == ("query", ("k_scale",))
    assert query.constant == 0.125 * math.log2(math.e)
    assert (key.name, key.is_inverse) == ("key", True)
    read_only = numerics_of(update_kv_cache=False, array_options=("k_scale", "v_scale"))
    assert [factor.name for factor in read_only.head_factors] == ["query", "output"]

"""Values that fix a kernel: their checks and what follows from them."""

import dataclasses
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_kernels import chips
from jax_kernels.ragged_paged_attention import BlockSizes
from jax_kernels.ragged_paged_attention.config import (
    AttentionSpec,
    KernelConfig,
    Phase,
    PhaseConfig,
)
from jax_kernels.ragged_paged_attention.layout import CacheLayout


@pytest.mark.parametrize("size", [0, -32, 3, 96, 32.0, "32"])
@pytest.mark.parametrize("field", ["decode_block_kv", "block_q", "block_kv"])
def test_block_sizes_are_powers_of_two(field, size):
    sizes = {"decode_block_kv": 32, "block_q": 32, "block_kv": 32} | {field: size}
    with pytest.raises(ValueError, match=rf"{field}: expected a power of two, got"):
        BlockSizes(**sizes)


def test_block_sizes_are_values():
    assert BlockSizes(32, 64, 128) == BlockSizes(32, 64, 128)
    assert hash(BlockSizes(32, 64, 128)) == hash(BlockSizes(32, 64, 128))


def make_phase(**changes) -> PhaseConfig:
    fields = {
        "phase": Phase.MIXED,
        "block_q": 64,
        "block_kv": 128,
        "num_slots": 4,
        "lookahead": 2,
    }
    return PhaseConfig(**fields | changes)


@pytest.mark.parametrize("lookahead", [0, 4, 5])
def test_a_ring_has_room_for_the_cell_and_those_ahead_of_it(lookahead):
    with pytest.raises(ValueError, match=f"lookahead={lookahead}"):
        make_phase(lookahead=lookahead)


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
    spec = AttentionSpec(sm_scale=0.125, **options)
    unit = 1 / options["soft_cap"] if "soft_cap" in options else math.log2(math.e)
    expected = 0.125 * options.get("k_scale", 1.0) * unit
    product = spec.query_multiplier * spec.score_multiplier
    assert product == pytest.approx(expected, rel=1e-12)


def test_queries_that_are_quantised_take_no_other_factor():
    """Otherwise the factor would change what is clipped."""
    spec = AttentionSpec(sm_scale=0.125, q_scale=0.5, k_scale=3.0)
    assert spec.query_multiplier == 2.0
    assert AttentionSpec(sm_scale=0.125).score_multiplier == 1.0


def make_config(
    heads=(8, 2), head_dim=128, cache_dtype="bfloat16", q_dtype="bfloat16", **spec
) -> KernelConfig:
    return KernelConfig(
        spec=AttentionSpec(**spec),
        cache=CacheLayout(4, 16, heads[1], head_dim, cache_dtype),
        phases=(),
        num_tokens=64,
        pages_per_sequence=8,
        num_q_heads=heads[0],
        q_dtype=jnp.dtype(q_dtype),
        io_dtype=jnp.dtype(q_dtype),
        out_dtype=jnp.dtype(q_dtype),
    )


@pytest.mark.parametrize(
    "heads, rows", [((8, 2), 256), ((6, 2), 192), ((5, 5), 64), ((7, 1), 448)]
)
def test_rows_of_a_key_head_are_heads_times_tokens(heads, rows):
    config = make_config(heads=heads)
    assert config.group == heads[0] // heads[1]
    assert config.query_rows(make_phase()) == rows


@pytest.mark.parametrize(
    "heads, block_q, rows",
    [
        ((8, 2), 64, 256),
        ((8, 2), 128, 512),
        ((8, 2), 256, 512),
        ((6, 2), 256, 768),
        ((5, 1), 256, 640),
        ((64, 1), 32, 512),
    ],
)
def test_softmax_tiles_divide_the_rows_of_a_key_head(heads, block_q, rows):
    config, phase = make_config(heads=heads), make_phase(block_q=block_q)
    assert config.softmax_rows(phase) == rows
    assert config.query_rows(phase) % rows == 0


@pytest.mark.parametrize(
    "chip, head_dim, dtype, expected",
    [
        (chips.TPU7X, 128, "bfloat16", True),
        (chips.V6E, 64, "bfloat16", True),
        (chips.TPU7X, 256, "bfloat16", False),
        (chips.V5E, 128, "bfloat16", False),
        (chips.TPU7X, 128, "float32", False),
    ],
)
def test_matrix_units_sum_where_they_are_wider_than_values(
    chip, head_dim, dtype, expected
):
    config = make_config(head_dim=head_dim, q_dtype=dtype)
    config = dataclasses.replace(config, chip=chip)
    assert config.sums_in_matrix_unit == expected


@pytest.mark.parametrize("heads, rows", [((3, 1), 8), ((8, 1), 8), ((9, 1), 16)])
def test_rows_of_decode_fill_registers(heads, rows):
    phase = make_phase(phase=Phase.DECODE, block_q=1)
    assert phase.is_decode
    assert make_config(heads=heads).query_rows(phase) == rows


@pytest.mark.parametrize(
    "q_dtype, cache_dtype, q_scale, multiply, value",
    [
        ("bfloat16", "bfloat16", None, "bfloat16", "bfloat16"),
        ("float32", "bfloat16", None, "float32", "float32"),
        ("bfloat16", "float32", None, "float32", "float32"),
        ("bfloat16", "float8_e4m3fn", None, "bfloat16", "bfloat16"),
        ("float32", "int8", None, "float32", "float32"),
        ("bfloat16", "float8_e4m3fn", 0.5, "float8_e4m3fn", "bfloat16"),
        ("bfloat16", "int8", 0.5, "int8", "bfloat16"),
    ],
)
def test_multiplications_take_the_wider_dtype_unless_queries_are_quantised(
    q_dtype, cache_dtype, q_scale, multiply, value
):
    config = make_config(q_dtype=q_dtype, cache_dtype=cache_dtype, q_scale=q_scale)
    assert config.multiply_dtype == jnp.dtype(multiply)
    assert config.value_dtype == jnp.dtype(value)


def test_heads_that_are_widened_for_their_layout_are_multiplied_in_their_own_dtype():
    config = dataclasses.replace(make_config(), io_dtype=jnp.dtype(jnp.float32))
    assert config.value_dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "dtype, tokens", [("float32", 8), ("bfloat16", 16), ("int8", 32)]
)
def test_a_chunk_of_new_tokens_fills_one_register(dtype, tokens):
    config = make_config(cache_dtype=dtype)
    assert config.rows_per_chunk == 8
    assert config.tokens_per_chunk == tokens


@pytest.mark.parametrize(
    "head_dim, io_lanes, lanes",
    [(32, 32, 128), (64, 64, 128), (96, 96, 128), (128, 128, 128), (192, 256, 256)],
)
def test_only_rows_longer_than_a_register_are_padded_by_the_caller(
    head_dim, io_lanes, lanes
):
    config = make_config(head_dim=head_dim)
    assert (config.io_lanes, config.lanes) == (io_lanes, lanes)


def test_the_e4m3_of_v6e_is_a_power_of_two_of_the_usual_one():
    """The factor that the configuration makes up for, over every finite number."""
    every_byte = np.arange(256, dtype=np.uint8)
    usual = every_byte.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    shifted = every_byte.view(ml_dtypes.float8_e4m3b11fnuz).astype(np.float32)
    is_plain = np.isfinite(usual) & (every_byte != 0x80)
    config = make_config(cache_dtype="float8_e4m3fn")
    assert config.output_scale == 1.0
    config = dataclasses.replace(config, chip=chips.V6E)
    assert config.reads_e4m3_shifted
    np.testing.assert_array_equal(
        usual[is_plain], shifted[is_plain] * config.output_scale
    )


@pytest.mark.parametrize("q_scale", [None, 0.5])
def test_quantised_queries_meet_keys_as_they_are_stored(q_scale):
    config = make_config(cache_dtype="float8_e4m3fn", q_scale=q_scale)
    shifted = dataclasses.replace(config, chip=chips.V6E)
    ratio = shifted.query_multiplier / config.query_multiplier
    assert ratio == (1.0 if q_scale else 16.0)
    assert shifted.output_scale == 16.0


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
    config = make_config(q_dtype=q_dtype, cache_dtype=cache_dtype, **{scaled: scale})
    config = dataclasses.replace(config, chip=chip)
    assert config.rounds_in_software == in_software
    assert config.rounds_in_16_bits == in_16_bits

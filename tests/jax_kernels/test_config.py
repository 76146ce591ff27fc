"""Values that fix a kernel: their checks and what follows from them."""

import dataclasses

import jax.numpy as jnp
import pytest

from jax_kernels.ragged_paged_attention import BlockSizes, numerics
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


def test_two_rings_of_blocks_hold_the_steps_ahead_and_those_behind():
    two = make_phase(num_slots=6, lookahead=3, num_kv_rings=2)
    assert two.slots_per_kv_ring == two.lookahead
    with pytest.raises(ValueError, match="num_slots"):
        make_phase(num_slots=6, lookahead=2, num_kv_rings=2)


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


@pytest.mark.parametrize("heads, rows", [((3, 1), 8), ((8, 1), 8), ((9, 1), 16)])
def test_rows_of_decode_fill_registers(heads, rows):
    phase = make_phase(phase=Phase.DECODE, block_q=1)
    assert phase.is_decode
    assert make_config(heads=heads).query_rows(phase) == rows


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


@pytest.mark.parametrize(
    "heads, q_dtype, io_group",
    [
        ((7, 1), "bfloat16", 8),
        ((9, 3), "bfloat16", 4),
        ((6, 2), "bfloat16", 3),
        ((8, 1), "bfloat16", 8),
        ((7, 1), "float32", 7),
    ],
)
def test_an_odd_query_head_has_a_partner_that_is_nothing(heads, q_dtype, io_group):
    """Two bfloat16 heads share a word."""
    config = make_config(heads=heads, q_dtype=q_dtype)
    assert config.io_group == io_group
    assert config.query_layout == config.out_layout
    assert config.query_layout.num_heads == io_group * heads[1]


def test_numerics_follow_from_the_configuration():
    config = make_config(cache_dtype="float8_e4m3fn", sm_scale=0.5)
    assert config.numerics is config.numerics
    assert config.numerics == numerics.choose(
        config.spec,
        config.chip,
        q_dtype=config.q_dtype,
        cache_dtype=config.cache.dtype,
        lanes=config.lanes,
    )
    changed = dataclasses.replace(config, spec=AttentionSpec(sm_scale=0.25))
    assert changed.numerics.query_multiplier == config.numerics.query_multiplier / 2

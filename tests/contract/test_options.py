"""Rules of the values of options, each for itself and together."""

import dataclasses

import numpy as np
import pytest

from jax_kernels.contract import AttentionOptions

pytestmark = pytest.mark.versions


def test_numbers_become_python_floats():
    options = AttentionOptions(sm_scale=1, k_scale=np.float64(2))
    assert type(options.sm_scale) is type(options.k_scale) is float
    assert options == AttentionOptions(k_scale=2.0)


@pytest.mark.parametrize("sm_scale", [0, -0.125, 1e-30, -1e30])
def test_scores_may_have_any_finite_factor(sm_scale):
    assert AttentionOptions(sm_scale=sm_scale).score_factor == sm_scale


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": 1}, "causal must be True or False, got 1"),
        ({"causal": None}, "causal must be True or False, got None"),
        ({"update_kv_cache": None}, "update_kv_cache must be True or False, got None"),
        ({"sm_scale": None}, "sm_scale must be a Python number.*got None"),
        ({"sm_scale": np.float32(1)}, "sm_scale must be a Python number"),
        ({"sm_scale": float("nan")}, "sm_scale must be .*got nan"),
        ({"sm_scale": float("inf")}, "sm_scale must be .*got inf"),
        ({"sm_scale": 1e300}, "sm_scale must be .*in size, got 1e"),
        ({"sm_scale": 1e-45}, "sm_scale must be .*in size, got 1e"),
        ({"soft_cap": 0.0}, "soft_cap must be a positive Python number"),
        ({"soft_cap": float("inf")}, "soft_cap must be a positive"),
        ({"q_scale": -1.0}, "q_scale must be a positive"),
        ({"k_scale": float("nan")}, "k_scale must be a positive"),
        ({"k_scale": np.ones(())}, "k_scale must be a positive"),
        ({"k_scale": 1e-45}, "k_scale .* its inverse are normal in float32"),
        ({"v_scale": 1e300}, "v_scale .* its inverse are normal in float32"),
        ({"q_scale": 1e-38}, "q_scale .* its inverse are normal in float32"),
        ({"v_scale": "1"}, "v_scale must be a positive"),
        ({"v_scale": True}, "v_scale must be a positive"),
        ({"sliding_window": 0}, "sliding_window must be a Python int from 1"),
        ({"sliding_window": 8.0}, "sliding_window must be a Python int"),
        ({"sliding_window": 2**63}, "sliding_window must be a Python int"),
        ({"causal_block": 0}, "causal_block must be a Python int from 1"),
        ({"causal_block": 4.0}, "causal_block must be a Python int from 1"),
        (
            {"causal_block": 4, "causal": False},
            "causal_block must be None with causal=False, got 4",
        ),
        ({"chunk_prefill_size": -1}, "chunk_prefill_size must be a Python int"),
        ({"chunk_prefill_size": True}, "chunk_prefill_size must be a Python int"),
        ({"decode_q_len": 0}, "decode_q_len must be a Python int from 1 to 16, got 0"),
        ({"decode_q_len": 17}, "decode_q_len must be .*17; .*ranges of distribution"),
        ({"decode_q_len": None}, "decode_q_len must be a Python int .*got None"),
        ({"decode_q_len": True}, "decode_q_len must be a Python int .*got True"),
        (
            {"sm_scale": 1e30, "k_scale": 1e30},
            r"sm_scale \* q_scale \* k_scale.*1e",
        ),
        ({"sm_scale": -1e-30, "q_scale": 1e-30}, r"sm_scale \* q_scale \* k_scale"),
        ({"sm_scale": 1e30, "soft_cap": 1e-30}, r"sm_scale .* soft_cap"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionOptions(**options)


@pytest.mark.parametrize("name", ["float16", "float8_e5m2", "int32"])
def test_another_output_dtype_names_the_alternative(name):
    with pytest.raises(NotImplementedError, match=f"out_dtype {name} .*use bfloat16"):
        AttentionOptions(out_dtype=name)


def test_another_dtype_of_probabilities_names_the_alternative():
    message = "probabilities_dtype float8_e5m2 .*use float8_e4m3fn or None"
    with pytest.raises(NotImplementedError, match=message):
        AttentionOptions(probabilities_dtype="float8_e5m2")


@pytest.mark.parametrize(
    "other", [{"probabilities_dtype": "float8_e4m3fn"}, {"attend": "cache"}]
)
def test_batch_invariant_goes_without_options_that_sum_in_parts(other):
    (value,) = other.values()
    message = f"batch_invariant is not supported with .*{value}.* leave one of them"
    with pytest.raises(NotImplementedError, match=message):
        AttentionOptions(batch_invariant=True, **other)


@pytest.mark.parametrize("window", [64, 65, 2**40, 2**63 - 1])
def test_a_window_as_long_as_the_context_is_none(window):
    options = AttentionOptions(sliding_window=window, causal=False)
    assert options.for_context(64) == AttentionOptions(causal=False)
    narrow = AttentionOptions(sliding_window=63)
    assert narrow.for_context(64) is narrow


def test_blocks_of_positions_are_powers_of_two():
    message = "causal_block 24 is not supported: use a power of two"
    with pytest.raises(NotImplementedError, match=message):
        AttentionOptions(causal_block=24)


def test_causal_blocks_of_one_or_of_all_positions_are_simpler_masks():
    one, all_positions = (AttentionOptions(causal_block=n) for n in (1, 64))
    assert one.for_context(64) == AttentionOptions()
    assert all_positions.for_context(64) == AttentionOptions(causal=False)
    assert all_positions.for_context(65) is all_positions


def test_options_are_found_among_other_variables():
    values = dataclasses.asdict(AttentionOptions(soft_cap=3.0)) | {"q": 1}
    assert AttentionOptions.named_in(values) == AttentionOptions(soft_cap=3.0)

"""Tests of ``jax_kernels.ragged_paged_attention.validation``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_kernels.ragged_paged_attention import layout, validation


def shaped(shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def static_arguments(cache_dtype="bfloat16", **changes):
    """T=24, S=3, P=4, Hq=6, Hkv=2, D=128, page_size 16, N=10."""
    arguments = dict(
        queries=shaped((24, 6, 128)),
        keys=shaped((24, 2, 128)),
        values=shaped((24, 2, 128)),
        kv_cache=shaped(
            layout.kv_cache_shape(10, 16, 2, 128, cache_dtype), cache_dtype
        ),
        kv_lens=shaped((3,), "int32"),
        page_indices=shaped((12,), "int32"),
        cu_q_lens=shaped((4,), "int32"),
        distribution=shaped((3,), "int32"),
    )
    return arguments | changes


def test_problem_holds_the_static_sizes():
    problem = validation.validate_static(
        **static_arguments(
            "float8_e4m3fn", sinks=shaped((6,), "float32"), out_dtype="float32"
        )
    )
    assert problem == validation.Problem(
        num_tokens=24,
        num_sequences=3,
        pages_per_sequence=4,
        num_q_heads=6,
        q_dtype=jnp.dtype("bfloat16"),
        out_dtype=jnp.dtype("float32"),
        cache=layout.CacheLayout(10, 16, 2, 128, jnp.dtype("float8_e4m3fn")),
    )
    assert problem.num_kv_heads == 2
    assert problem.num_q_heads_per_kv_head == 3
    assert problem.head_dim == 128
    assert problem.max_kv_len == 64


def test_output_has_the_dtype_of_the_queries_by_default():
    problem = validation.validate_static(**static_arguments())
    assert problem.out_dtype == jnp.bfloat16


@pytest.mark.parametrize("head_dim", [64, 128])
def test_heads_come_from_the_cache_when_there_are_no_keys(head_dim):
    cache_shape = layout.kv_cache_shape(10, 16, 2, head_dim, "int8")
    problem = validation.validate_static(
        **static_arguments(
            queries=shaped((24, 6, head_dim)),
            keys=None,
            values=None,
            kv_cache=shaped(cache_shape, "int8"),
            update_kv_cache=False,
        )
    )
    assert problem.num_kv_heads == 2


@pytest.mark.parametrize(
    "options",
    [
        {"q_scale": 0.5, "k_scale": 0.1, "v_scale": 2.0},
        {"sliding_window": 1, "soft_cap": 30.0, "causal": False},
        {"chunk_prefill_size": 8, "sm_scale": 1},
    ],
)
def test_options_are_accepted(options):
    validation.validate_static(**static_arguments("float8_e5m2", **options))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"queries": shaped((24, 128))}, r"queries: expected .*got shape \(24, 128\)"),
        ({"queries": shaped((0, 6, 128))}, "queries: expected a non-empty"),
        ({"queries": shaped((24, 5, 128))}, "queries: expected .*multiple.*got.*5"),
        ({"keys": shaped((24, 128))}, r"keys: expected shape .*got \(24, 128\)"),
        ({"keys": shaped((24, 0, 128))}, "keys: expected shape"),
        ({"keys": shaped((23, 2, 128))}, r"keys: expected shape \(24, 2, 128\), got"),
        ({"keys": shaped((24, 2, 64))}, r"keys: expected shape \(24, 2, 128\), got"),
        ({"keys": shaped((24, 2, 128), "float32")}, "keys: expected dtype bfloat16"),
        ({"values": shaped((24, 3, 128))}, r"values: expected shape \(24, 2, 128\)"),
        ({"values": shaped((24, 2, 128), "float32")}, "values: expected dtype"),
        ({"keys": None}, "keys: expected an array because values is one, got None"),
        ({"values": None}, "values: expected an array because keys is one"),
        ({"kv_cache": shaped((10, 16, 2, 128))}, "kv_cache: expected 5 axes"),
        ({"kv_cache": shaped((10, 2, 8, 2, 128))}, "kv_cache: expected shape"),
        ({"kv_lens": shaped((3, 1), "int32")}, "kv_lens: expected shape"),
        ({"kv_lens": shaped((0,), "int32")}, "kv_lens: expected shape.*at least 1"),
        ({"kv_lens": shaped((3,), "int16")}, "kv_lens: expected dtype int32, got"),
        ({"cu_q_lens": shaped((3,), "int32")}, r"cu_q_lens: expected shape \(4,\)"),
        ({"cu_q_lens": shaped((4,), "float32")}, "cu_q_lens: expected dtype int32"),
        ({"distribution": shaped((2,), "int32")}, r"distribution: expected shape"),
        ({"distribution": shaped((3,), "int8")}, "distribution: expected dtype"),
        ({"page_indices": shaped((3, 4), "int32")}, "page_indices: expected a flat"),
        ({"page_indices": shaped((13,), "int32")}, "page_indices: expected a flat"),
        ({"page_indices": shaped((0,), "int32")}, "page_indices: expected a flat"),
        ({"page_indices": shaped((12,), "uint32")}, "page_indices: expected dtype"),
        ({"sinks": shaped((5,), "float32")}, r"sinks: expected shape \(6,\), got"),
        ({"sinks": shaped((6,), "bfloat16")}, "sinks: expected dtype float32, got"),
        ({"causal": 1}, "causal: expected True or False, got 1"),
        ({"update_kv_cache": None}, "update_kv_cache: expected True or False"),
        ({"sm_scale": 0.0}, r"sm_scale: expected a positive finite .*got 0\.0"),
        ({"sm_scale": np.float32(1)}, "sm_scale: expected a .*Python float, got"),
        ({"soft_cap": 0.0}, "soft_cap: expected a positive"),
        ({"soft_cap": float("inf")}, "soft_cap: expected a positive finite"),
        ({"q_scale": -1.0}, "q_scale: expected a positive"),
        ({"k_scale": float("nan")}, "k_scale: expected a positive"),
        ({"k_scale": np.ones(())}, "k_scale: expected a positive"),
        ({"v_scale": "1"}, "v_scale: expected a positive"),
        ({"v_scale": True}, "v_scale: expected a positive"),
        ({"sliding_window": 0}, "sliding_window: expected a positive Python int"),
        ({"sliding_window": 8.0}, "sliding_window: expected a positive Python int"),
        ({"chunk_prefill_size": -1}, "chunk_prefill_size: expected a positive"),
        ({"chunk_prefill_size": True}, "chunk_prefill_size: expected a positive"),
    ],
)
def test_wrong_arguments_are_named_with_what_was_expected(change, message):
    with pytest.raises(ValueError, match=message):
        validation.validate_static(**static_arguments(**change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"queries": shaped((24, 6, 512))}, "head_dim: 512 .*; use"),
        ({"queries": shaped((24, 6, 24))}, "head_dim: 24 .*; pad"),
        ({"queries": shaped((24, 6, 128), "float16")}, "float16 .*; cast to bfloat16"),
        ({"q_scale": 0.5}, "q_scale: .*q_scale=None, or use a float8 or int8 cache"),
        ({"out_dtype": "float8_e5m2"}, "out_dtype: float8_e5m2 .*; use bfloat16"),
        ({"keys": None, "values": None}, "keys, values: .*update_kv_cache=False"),
        ({"kv_cache": shaped((10, 4, 8, 2, 128), "float16")}, "float16 .*; use one of"),
    ],
)
def test_unsupported_arguments_name_the_alternative(change, message):
    with pytest.raises(NotImplementedError, match=message):
        validation.validate_static(**static_arguments(**change))


@pytest.mark.parametrize("shape", [(10, 3, 8, 2, 128), (10, 4, 8, 128)])
def test_heads_that_cannot_come_from_the_cache_are_refused(shape):
    arguments = static_arguments(kv_cache=shaped(shape), keys=None, values=None)
    with pytest.raises(ValueError, match="kv_cache: expected 5 axes with a multiple"):
        validation.validate_static(**arguments, update_kv_cache=False)


def dynamic_arguments(**changes):
    """Decode, prefill by 8, mixed, an empty sequence, then one that is not live."""
    arguments = dict(
        kv_lens=[20, 24, 5, 3, -7],
        page_indices=[
            *(4, 5, -1),  # positions 0..19
            *(4, 6, 99),  # 0..23: page 4 is a shared prefix
            *(7, -1, -1),
            *(-1, -1, -1),
            *(99, 99, 99),
        ],
        cu_q_lens=[0, 1, 9, 14, 14, 9999],
        distribution=[1, 2, 4],
        page_size=16,
        num_pages=8,
        num_tokens=16,
        chunk_prefill_size=8,
    )
    return arguments | changes


def check_dynamic(**changes):
    arguments = dynamic_arguments(**changes)
    for name in ("kv_lens", "page_indices", "cu_q_lens", "distribution"):
        arguments[name] = np.array(arguments[name], np.int32)
    validation.validate_dynamic(**arguments)


def test_valid_metadata_passes_whatever_its_dead_entries():
    check_dynamic()


def test_no_live_sequences_is_valid():
    check_dynamic(distribution=[0, 0, 0])


def test_prefill_may_have_any_length_without_a_chunk_size():
    check_dynamic(chunk_prefill_size=None, cu_q_lens=[0, 1, 8, 13, 13, 0])


def pages(*, sequence, column, page):
    table = list(dynamic_arguments()["page_indices"])
    table[sequence * 3 + column] = page
    return {"page_indices": table}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"distribution": [2, 1, 4]}, r"distribution: expected 0 <= i.*got \(2, 1, 4"),
        ({"distribution": [1, 3, 2]}, "distribution: expected"),
        ({"distribution": [-1, 2, 4]}, "distribution: expected"),
        ({"distribution": [1, 2, 6]}, "distribution: expected.*num_sequences=5"),
        ({"cu_q_lens": [1, 2, 10, 15, 15, 0]}, "cu_q_lens: expected to start with 0"),
        ({"cu_q_lens": [0, 1, 9, 8, 14, 0]}, "cu_q_lens: expected no decrease.*2"),
        ({"num_tokens": 13}, "cu_q_lens: expected at most num_tokens=13.*got 14"),
        ({"distribution": [2, 2, 4]}, "expected 1 query token in decode sequence 1"),
        ({"chunk_prefill_size": 9}, "chunk_prefill_size=9 query tokens in prefill"),
        ({"distribution": [1, 3, 4]}, "prefill sequence 2, got 5"),
        ({"kv_lens": [20, 24, 49, 3, 0]}, "kv_lens: .*= 48, got 49 for sequence 2"),
        ({"kv_lens": [20, 24, 5, -1, 0]}, "kv_lens: .*got -1 for sequence 3"),
        ({"kv_lens": [20, 24, 4, 3, 0]}, "kv_lens: .*the 5 new tokens of sequence 2"),
        ({"kv_lens": [0, 24, 5, 3, 0]}, "kv_lens: .*the 1 new tokens of sequence 0"),
        (pages(sequence=0, column=1, page=-1), "page_indices: .*got -1 for page 1 of"),
        (pages(sequence=1, column=1, page=8), "page_indices: .*from 0 to 7, got 8"),
        (pages(sequence=2, column=0, page=6), r"slot 0 of page 6 .*sequences \[1, 2\]"),
        (pages(sequence=2, column=0, page=5), r"slot 3 of page 5 .*sequences \[0, 2\]"),
        (pages(sequence=1, column=1, page=4), r"of page 4 .*sequences \[0, 1\]"),
    ],
)
def test_wrong_values_are_named_with_their_sequence(change, message):
    with pytest.raises(ValueError, match=message):
        check_dynamic(**change)


def test_slots_may_be_shared_when_nothing_is_written():
    check_dynamic(**pages(sequence=2, column=0, page=6), update_kv_cache=False)

"""Tests of ``jax_kernels.ragged_paged_attention.reference`` against float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_kernels.ragged_paged_attention import ragged_paged_attention_reference
from tests.support import numerics
from tests.support.ragged_batches import make_ragged_batch

# Decodes, an empty sequence, page-exact and one-off lengths, fresh and chunked prefill.
SEQUENCES = [(1, 1), (1, 16), (1, 17), (0, 0), (0, 9), (5, 5), (16, 33), (30, 70)]
SHAPES = {  # head_dim: Hq, Hkv
    64: (4, 2),
    40: (5, 1),
    96: (6, 2),
    128: (3, 3),
    256: (2, 1),
}


def jitted(**options):
    return jax.jit(functools.partial(ragged_paged_attention_reference, **options))


def check(batch, **options):
    """Runs the reference and compares output and cache; returns both."""
    out, *lse, kv_cache = jitted(**options)(*batch.jax_arguments)
    options.pop("return_lse", None)
    options.pop("chunk_prefill_size", None)
    options.pop("decode_q_len", None)
    options.pop("out_dtype", None)
    numerics.assert_matches_oracle(
        out, kv_cache, batch.arguments, lse=lse[0] if lse else None, **options
    )
    return np.asarray(out), np.asarray(kv_cache)


@pytest.mark.parametrize("head_dim", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_and_cache_match_float64(head_dim, dtype):
    num_q_heads, num_kv_heads = SHAPES[head_dim]
    batch = make_ragged_batch(
        SEQUENCES,
        head_dim=head_dim,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        q_dtype=dtype,
        shared_prefix_pages=1,
        nan_payloads=True,
    )
    check(batch, sm_scale=head_dim**-0.5)


@pytest.mark.parametrize("attend", ["all", "cache", "new"])
@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 9}, {"causal": False}, {"update_kv_cache": False}],
    ids=str,
)
def test_parts_of_keys_and_their_sums_match_float64(attend, options):
    updates = options.get("update_kv_cache", True)
    batch = make_ragged_batch(
        SEQUENCES,
        with_sinks=attend == "cache",
        cache_holds_new_tokens=not updates,
    )
    check(batch, sm_scale=0.1, attend=attend, return_lse=True, **options)


@pytest.mark.parametrize("cache_dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("head_dim, q_scale", [(64, None), (128, 0.031)])
def test_quantized_caches_match_float64(cache_dtype, head_dim, q_scale):
    scales: dict[str, Any] = {"k_scale": 0.037, "v_scale": 0.021}
    batch = make_ragged_batch(
        SEQUENCES,
        head_dim=head_dim,
        q_dtype="bfloat16",
        cache_dtype=cache_dtype,
        nan_payloads=True,
        **scales,
    )
    check(batch, sm_scale=head_dim**-0.5, q_scale=q_scale, **scales)


@pytest.mark.parametrize("cache_dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_new_tokens_are_clipped_not_overflowed(cache_dtype):
    batch = make_ragged_batch([(4, 4)], cache_dtype=cache_dtype)
    batch.keys[:4] *= 1e6
    batch.values[:4] *= 1e6
    check(batch, sm_scale=1e-4)


def test_bfloat16_cache_under_float32_queries_is_attended_as_stored():
    batch = make_ragged_batch(SEQUENCES, q_dtype="float32", cache_dtype="bfloat16")
    check(batch, sm_scale=0.125)


@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16"])
def test_scales_apply_to_unquantized_caches_too(cache_dtype):
    scales: dict[str, Any] = {"k_scale": 0.7, "v_scale": 3.0}
    batch = make_ragged_batch(SEQUENCES, q_dtype=cache_dtype, **scales)
    check(batch, sm_scale=0.125, **scales)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"sliding_window": 1},
        {"sliding_window": 7},
        {"sliding_window": 16, "causal": False},
        {"sliding_window": 2**31 - 1},
        {"soft_cap": 2.0},
        {"soft_cap": 2.0, "sliding_window": 20, "causal": False},
    ],
    ids=str,
)
def test_masks_caps_and_sinks_match_float64(options):
    batch = make_ragged_batch(SEQUENCES, with_sinks=True)
    check(batch, sm_scale=0.125, **options)


@pytest.mark.parametrize(
    "options", [{"causal": False}, {"sliding_window": 7}, {"soft_cap": 2.0}], ids=str
)
def test_masks_and_caps_match_float64_without_sinks(options):
    check(make_ragged_batch(SEQUENCES), sm_scale=0.125, **options)


@pytest.mark.parametrize("page_size", [8, 512])
def test_smallest_and_largest_pages(page_size):
    batch = make_ragged_batch(SEQUENCES, page_size=page_size, num_spare_pages=1)
    check(batch, sm_scale=0.125)


def test_several_blocks_of_keys_and_of_queries():
    # Blocks are 512 keys and, with S = 2 and T = 700, 64 queries.
    batch = make_ragged_batch([(600, 1100), (100, 513)], max_sequences=2, page_size=64)
    check(batch, sm_scale=0.125)
    check(batch, sm_scale=0.125, sliding_window=530)


@pytest.mark.slow
def test_positions_beyond_32768():
    batch = make_ragged_batch(
        [(3, 33_000)], num_q_heads=2, num_kv_heads=1, page_size=512, head_dim=32
    )
    check(batch, sm_scale=0.2)
    check(batch, sm_scale=0.2, sliding_window=32_900)


def test_decode_at_page_and_block_boundaries():
    kv_lens = [7, 8, 9, 15, 16, 17, 511, 512, 513]
    batch = make_ragged_batch([(1, kv_len) for kv_len in kv_lens], page_size=8)
    check(batch, sm_scale=0.125)


def test_without_update_the_cache_is_read_and_returned():
    batch = make_ragged_batch(SEQUENCES, cache_holds_new_tokens=True)
    want, _ = check(batch, sm_scale=0.125, update_kv_cache=False)
    arguments = list(batch.jax_arguments)
    arguments[1] = arguments[2] = None
    out, kv_cache = ragged_paged_attention_reference(
        *arguments, sm_scale=0.125, update_kv_cache=False
    )
    np.testing.assert_array_equal(out, want)
    assert kv_cache is arguments[3]


def test_result_does_not_depend_on_how_sequences_are_classified():
    sequences = [(1, 30), (4, 20), (4, 4), (9, 40)]
    outs = [
        check(
            make_ragged_batch(sequences, distribution=distribution),
            chunk_prefill_size=4,
        )[0]
        for distribution in [(0, 0, 4), (1, 3, 4), (1, 1, 4)]
    ]
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


@pytest.mark.parametrize("sequences", [[], [(0, 0)], [(0, 40), (0, 0)]], ids=str)
def test_nothing_to_do_gives_zeros_and_the_same_cache(sequences):
    batch = make_ragged_batch(sequences, nan_payloads=True)
    out, kv_cache = check(batch)
    assert not out.any()
    numerics.assert_same_bytes(kv_cache, batch.kv_cache)


def test_queries_without_any_keys_give_zeros_and_write_nothing():
    # Invalid as a value, but it must not hang or reach other sequences.
    batch = make_ragged_batch([(1, 20), (3, 0), (2, 9)], with_sinks=True)
    out, _ = check(batch)
    assert not out[1:4].any() and out[4:6].any()


def test_every_slot_full_needs_no_padding_anywhere():
    batch = make_ragged_batch(
        [(1, 32), (31, 32)],
        max_sequences=2,
        pages_per_sequence=2,
        num_tokens=32,
        num_spare_pages=0,
    )
    check(batch, sm_scale=0.125)


def test_more_sequences_than_tokens():
    batch = make_ragged_batch([(2, 20)], max_sequences=9, num_tokens=2)
    check(batch, sm_scale=0.125)


def test_a_nan_stays_in_its_own_sequence():
    batch = make_ragged_batch([(2, 20), (3, 30), (1, 9)])
    clean, _ = jitted()(*batch.jax_arguments)
    batch.queries[3] = batch.keys[3] = batch.values[3] = np.nan
    out, _ = jitted()(*batch.jax_arguments)
    others = np.array([0, 1, 5])
    np.testing.assert_array_equal(np.asarray(out)[others], np.asarray(clean)[others])
    assert np.isnan(out[3]).all()


def test_output_dtype_is_chosen():
    batch = make_ragged_batch([(3, 20)], q_dtype="bfloat16")
    out, _ = check(batch, out_dtype="float32")
    assert out.dtype == jnp.float32
    # Rounding the output is the only difference.
    rounded, _ = check(batch)
    np.testing.assert_array_equal(out.astype(jnp.bfloat16), rounded)


def test_one_compilation_serves_all_lengths():
    num_traces = 0

    @jax.jit
    def run(*arguments):
        nonlocal num_traces
        num_traces += 1
        return ragged_paged_attention_reference(*arguments, sm_scale=0.125)

    for seed, sequences in enumerate([[(1, 9)], [(20, 50), (1, 1)], [(10, 10)] * 4]):
        num_pages = sum(-(-kv_len // 16) for _, kv_len in sequences)
        batch = make_ragged_batch(
            sequences,
            max_sequences=4,
            pages_per_sequence=4,
            num_tokens=40,
            num_spare_pages=20 - num_pages,
            seed=seed,
        )
        out, kv_cache = run(*batch.jax_arguments)
        numerics.assert_matches_oracle(out, kv_cache, batch.arguments, sm_scale=0.125)
    assert num_traces == 1


def test_arguments_are_validated():
    arguments = list(make_ragged_batch([(1, 9)]).jax_arguments)
    arguments[4] = arguments[4].astype(jnp.int16)
    with pytest.raises(ValueError, match=r"kv_lens must be int32 \[3\]"):
        ragged_paged_attention_reference(*arguments)

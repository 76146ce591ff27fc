"""The kernel with ``return_lse`` and with ``attend``: parts of the keys, their sums.

Cases are as in test_kernel_numerics.py. In addition the logarithms are held to the
error of their data, and to infinities that are exact.
"""

import dataclasses

import numpy as np
import pytest

from jax_kernels.ragged_paged_attention import BlockSizes
from tests.jax_kernels.test_kernel_numerics import (
    BF16,
    E4M3,
    F32,
    INT8,
    INT8_SCALES,
    LENGTHS,
    Case,
)
from tests.support.interpret import run_kernel
from tests.support.ragged_batches import make_ragged_batch

# Each case compiles a simulation of its own.
pytestmark = pytest.mark.slow

# Nothing in the cache, one token, a block of 32 exactly, new tokens in three blocks.
PARTS = ((1, 1), (1, 2), (1, 33), (1, 65), (3, 3), (5, 37), (40, 72), (33, 60))
DECODES_OF_FOUR = ((4, 4), (1, 30), (3, 64), (2, 34), (0, 0), (1, 1))


def parts(case: Case, **options) -> Case:
    lengths = PARTS if case.lengths is LENGTHS else case.lengths
    options = {"return_lse": True, **case.options, **options}
    return dataclasses.replace(case, lengths=lengths, options=options)


CASES = {
    "all": parts(Case()),
    "cache_fused_e4m3_sinks": parts(
        Case(head_dim=64, cache_dtype=E4M3, with_sinks=True), attend="cache"
    ),
    "new_f32": parts(
        Case(q_dtype=F32, cache_dtype=F32), attend="new", soft_cap=5.0, causal=False
    ),
}
MORE_CASES = {
    "all_sinks_mqa_5_to_1": parts(Case(heads=(5, 1), with_sinks=True)),
    "all_one_cell_of_a_window": parts(
        Case(heads=(8, 1), blocks=BlockSizes(32, 32, 32)), sliding_window=32
    ),
    "all_160_heads": parts(Case(heads=(160, 2)), update_kv_cache=False),
    "all_d256_float8": parts(
        Case(head_dim=256, cache_dtype=E4M3),
        probabilities_dtype=E4M3,
        k_scale=0.5,
        chip="tpu7x",
    ),
    "all_chunks": parts(
        Case(lengths=((1, 9), (16, 16), (16, 50), (7, 30))), chunk_prefill_size=16
    ),
    "cache_without_causal_mask": parts(Case(), attend="cache", causal=False),
    "cache_of_a_window": parts(Case(with_sinks=True), attend="cache", sliding_window=7),
    "cache_without_update": parts(Case(), attend="cache", update_kv_cache=False),
    "cache_float8_probabilities": parts(
        Case(cache_dtype=E4M3),
        attend="cache",
        probabilities_dtype=E4M3,
        chip="tpu7x",
    ),
    "cache_decodes_of_four": parts(
        Case(lengths=DECODES_OF_FOUR, with_sinks=True), attend="cache", decode_q_len=4
    ),
    "new_decodes_of_four": parts(
        Case(lengths=DECODES_OF_FOUR, heads=(8, 1)), attend="new", decode_q_len=4
    ),
    "new_fused_int8": parts(
        Case(head_dim=64, cache_dtype=INT8, page_size=32, options=INT8_SCALES),
        attend="new",
    ),
    "new_of_a_window": parts(Case(q_dtype=BF16), attend="new", sliding_window=9),
    "new_without_update": parts(Case(), attend="new", update_kv_cache=False),
    "new_page_larger_than_block": parts(Case(page_size=128), attend="new"),
}


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=name) for name, case in CASES.items()),
        *(
            pytest.param(case, id=name, marks=pytest.mark.extended)
            for name, case in MORE_CASES.items()
        ),
    ],
)
def test_parts_of_keys_and_their_sums(case):
    distribution = None
    if case.options.get("decode_q_len"):
        distribution = (len(case.lengths),) * 3
    if case.options.get("chunk_prefill_size"):
        distribution = (1, 3, 4)
    case.check(distribution=distribution)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="decode_and_mixed"),
        pytest.param({"causal": False}, id="full", marks=pytest.mark.extended),
        pytest.param({"sliding_window": 7}, id="window", marks=pytest.mark.extended),
        pytest.param(
            {"decode_q_len": 4}, id="decodes_of_four", marks=pytest.mark.extended
        ),
        pytest.param(
            {"decode_q_len": 4, "sliding_window": 7},
            id="window_of_four",
            marks=pytest.mark.extended,
        ),
    ],
)
def test_keys_of_the_cache_without_slots_for_new_ones(options):
    """Pages end with the old tokens, and the table has room for no more."""
    num_decodes = 5 if "decode_q_len" in options else 3
    lengths = [(1, 33), (1, 1), (1, 65), (3, 67), (4, 20), (50, 114), (40, 40)]
    case = dataclasses.replace(
        Case(),
        lengths=tuple(lengths),
        options={
            "attend": "cache",
            "return_lse": True,
            "update_kv_cache": False,
            **options,
        },
    )
    case.check(
        new_tokens_have_slots=False,
        pages_per_sequence=4,
        distribution=(num_decodes, num_decodes, len(lengths)),
    )


@pytest.mark.extended
@pytest.mark.parametrize("attend", ["all", "cache"])
def test_infinite_sinks_have_exact_sums(attend):
    batch = make_ragged_batch(PARTS, q_dtype=BF16, with_sinks=True)
    assert batch.sinks is not None
    batch.sinks[:2] = np.inf, -np.inf
    arguments = batch.jax_arguments
    out, lse, _ = run_kernel(arguments, sm_scale=0.1, attend=attend, return_lse=True)
    live = slice(0, batch.num_live_tokens)
    assert np.isposinf(lse[live, 0]).all() and not out[live, 0].any()
    sees_nothing = np.zeros(len(lse), bool)
    if attend == "cache":
        for s, (q_len, kv_len) in enumerate(PARTS):
            first = batch.cu_q_lens[s]
            sees_nothing[first : first + q_len] = q_len == kv_len
    sees_nothing[batch.num_live_tokens :] = True
    np.testing.assert_array_equal(np.isneginf(lse[:, 1]), sees_nothing)
    assert np.isfinite(lse[live, 2:]).all()

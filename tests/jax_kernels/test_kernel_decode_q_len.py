"""Sequences of the decode range with several new tokens.

The batches of the tests poison dead slots, and the whole cache is compared. The split
of the sequences never changes the answer, so some batches are served both ways.
"""

from typing import Any

import numpy as np
import pytest

from jax_kernels.ragged_paged_attention import BlockSizes
from tests.support.interpret import assert_kernel_matches_oracle, run_kernel
from tests.support.numerics import assert_same_bytes
from tests.support.ragged_batches import make_ragged_batch

OPTIONS: dict[str, Any] = {"sm_scale": 0.1}
# (q_len, kv_len). Blocks have 32 tokens, pages 16, packed rows up to 4. Between the
# sequences with tokens are some without, or without a context.
SEQUENCES = [
    *[(4, 20), (1, 17), (0, 9), (3, 3), (4, 4), (1, 1), (0, 0)],
    *[(2, 33), (4, 31), (4, 32), (4, 33), (4, 34), (4, 35), (4, 36)],
    *[(3, 65), (2, 16), (4, 18)],
]
BF16 = {"q_dtype": "bfloat16", "head_dim": 128}
INT8 = {"k_scale": 0.03, "v_scale": 0.03}


def make_batch(q_len: int, num_mixed: int = 0, **arguments):
    """Up to ``q_len`` tokens of each sequence; the last sequences are mixed."""
    sequences = [(min(q, q_len), kv) for q, kv in SEQUENCES]
    if q_len > 4:
        # Of the longest, places before, at and after the boundaries of a block.
        sequences += [(q_len, kv) for kv in range(31, 34 + q_len, 5)]
        sequences += [(q_len, q_len), (q_len - 3, 70)]
    num_decodes = len(sequences) - num_mixed
    distribution = (num_decodes, num_decodes, len(sequences))
    return make_ragged_batch(sequences, distribution=distribution, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("q_len", "arguments", "options"),
    [
        pytest.param(4, BF16 | {"num_q_heads": 8}, {}, id="bf16"),
        pytest.param(2, BF16 | {"num_kv_heads": 4}, {}, id="heads_share_registers"),
        pytest.param(
            3, BF16 | {"num_q_heads": 10, "with_sinks": True}, {}, id="odd_group"
        ),
        pytest.param(
            4, BF16 | {"num_q_heads": 8, "num_kv_heads": 1}, {}, id="one_key_head"
        ),
        pytest.param(
            16, {"q_dtype": "float32"}, {"sliding_window": 40}, id="f32_16_tokens"
        ),
        pytest.param(
            8,
            BF16 | {"cache_dtype": "float8_e4m3fn", "with_sinks": True},
            {"sliding_window": 7},
            id="fp8_window_sinks",
        ),
        pytest.param(
            4,
            BF16 | {"cache_dtype": "int8"} | INT8,
            INT8 | {"q_scale": 0.03},
            id="int8",
        ),
        pytest.param(
            4,
            {"q_dtype": "bfloat16"},
            {"causal": False, "sliding_window": 9, "soft_cap": 5.0},
            id="not_causal",
        ),
        pytest.param(4, {"q_dtype": "bfloat16", "head_dim": 256}, {}, id="wide"),
        pytest.param(
            4,
            BF16 | {"cache_holds_new_tokens": True},
            {"update_kv_cache": False},
            id="read_only",
        ),
    ],
)
def test_up_to_so_many_tokens_are_decodes(q_len, arguments, options):
    batch = make_batch(q_len, **arguments)
    assert_kernel_matches_oracle(batch, decode_q_len=q_len, **OPTIONS, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "copies", ["on_wait", pytest.param("eager", marks=pytest.mark.extended)]
)
def test_the_split_of_the_sequences_changes_nothing(copies):
    """Decodes and mixed ones in one call, and the same as mixed ones only."""
    batch = make_batch(4, num_mixed=4, num_q_heads=8, **BF16)
    out, kv_cache = assert_kernel_matches_oracle(
        batch, decode_q_len=4, copies=copies, **OPTIONS
    )
    num_live = batch.distribution[2]
    as_mixed = batch.replace(distribution=np.array([0, 0, num_live], np.int32))
    other_out, other_cache = run_kernel(as_mixed.jax_arguments, **OPTIONS)
    assert_same_bytes(kv_cache, other_cache)
    np.testing.assert_allclose(
        out.astype(np.float32), other_out.astype(np.float32), atol=0.02, rtol=0.02
    )


@pytest.mark.slow
def test_pages_of_several_tokens_start_in_the_shadow():
    """Blocks of many pages are in two rings, on chips that have room for them."""
    sequences = [(n % 5, n % 5 + 61 * n % 190) for n in range(16)]
    batch = make_ragged_batch(
        sequences,
        distribution=(16, 16, 16),
        page_size=8,
        q_dtype="bfloat16",
        head_dim=128,
        num_q_heads=4,
        num_kv_heads=1,
    )
    blocks = BlockSizes(decode_block_kv=64, block_q=32, block_kv=32)
    assert_kernel_matches_oracle(
        batch, decode_q_len=4, chip="tpu7x", block_sizes=blocks, **OPTIONS
    )


def test_two_tokens_that_straddle_a_block():
    batch = make_ragged_batch(
        [(2, 33), (1, 5)], distribution=(2, 2, 2), q_dtype="float32", num_kv_heads=1
    )
    assert_kernel_matches_oracle(batch, decode_q_len=2, **OPTIONS)

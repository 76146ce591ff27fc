"""Probabilities of prefill in float8: the error has a bound, whatever the scores are.

All is held to float64. The budget comes from an emulation that rounds weights, relative
to the largest of their row, as e4m3fn does. The chip is one that uses them.
"""

from typing import Any

import numpy as np
import pytest

from jax_kernels.ragged_paged_attention import BlockSizes
from tests.support.interpret import assert_kernel_matches_oracle
from tests.support.ragged_batches import RaggedBatch, make_ragged_batch

# Each case compiles a simulation of its own.
pytestmark = pytest.mark.slow

# Decodes and empty sequences beside prompts of several tiles and blocks, some of which
# no mask meets.
LENGTHS = ((1, 40), (40, 300), (0, 7), (70, 70), (33, 161))
BLOCKS = BlockSizes(decode_block_kv=128, block_q=32, block_kv=128)
FLOAT8: dict[str, Any] = {"probabilities_dtype": "float8_e4m3fn", "chip": "tpu7x"}


def make_batch(head_dim: int, slope: float = 0.0, **arguments) -> RaggedBatch:
    """A batch whose scores, in units of log2, rise by ``slope`` with new tokens."""
    batch = make_ragged_batch(
        LENGTHS,
        head_dim=head_dim,
        q_dtype="bfloat16",
        cache_dtype="float8_e4m3fn",
        distribution=(1, 1, len(LENGTHS)),
        **arguments,
    )
    if not slope:
        return batch
    queries, keys = batch.queries.copy(), batch.keys.copy()
    queries[..., 0] = 1.0
    position = np.concatenate([np.arange(q_len) for q_len, _ in LENGTHS])
    # sm_scale is D**-0.5, and scores become units of log2 by log2(e).
    keys[: len(position), :, 0] = (slope * position * head_dim**0.5 / np.log2(np.e))[
        :, None
    ]
    return batch.replace(queries=queries, keys=keys)


@pytest.mark.parametrize(
    ("head_dim", "with_sinks", "options"),
    [
        pytest.param(128, False, {"q_scale": 0.5, "k_scale": 0.5}, id="128"),
        pytest.param(256, True, {"q_scale": 0.5, "v_scale": 2.0}, id="256"),
        pytest.param(
            64,
            True,
            {"causal": False, "soft_cap": 5.0},
            id="64",
            marks=pytest.mark.extended,
        ),
    ],
)
def test_outputs_are_within_the_budget_of_e4m3(head_dim, with_sinks, options):
    batch = make_batch(head_dim, with_sinks=with_sinks)
    assert_kernel_matches_oracle(
        batch, block_sizes=BLOCKS, sm_scale=head_dim**-0.5, **FLOAT8, **options
    )


@pytest.mark.parametrize("slope", [-0.5, 0.25, 2.0])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_scores_may_leave_the_range_of_e4m3(head_dim, slope):
    """Later probabilities are too large for it, some of them by far, or too small."""
    batch = make_batch(head_dim, slope, with_sinks=True)
    assert_kernel_matches_oracle(
        batch, block_sizes=BLOCKS, sm_scale=head_dim**-0.5, **FLOAT8
    )

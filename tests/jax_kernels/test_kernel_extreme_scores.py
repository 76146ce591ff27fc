"""Scores far above and far below those that a row of prefill is anchored at.

Prompts are of several tiles and blocks: a row is anchored at its first block, and later
ones have scores that rise or fall with the position. All is held to float64.
"""

import numpy as np
import pytest

from jax_kernels.ragged_paged_attention import BlockSizes
from tests.support.interpret import SMALL_BLOCKS, assert_kernel_matches_oracle
from tests.support.ragged_batches import RaggedBatch, make_ragged_batch

# Each case compiles a simulation of its own.
pytestmark = pytest.mark.slow

# Fresh prompts, whose keys are all given. Blocks have 32 tokens, and so have tiles.
LENGTHS = ((130, 130), (70, 70))
HEAD_DIM = 128


def make_batch(slope: float, q_dtype: str, with_sinks: bool) -> RaggedBatch:
    """Prompts whose scores, in units of log2, rise by ``slope`` with every token."""
    batch = make_ragged_batch(
        LENGTHS,
        head_dim=HEAD_DIM,
        q_dtype=q_dtype,
        with_sinks=with_sinks,
        distribution=(0, 0, len(LENGTHS)),
    )
    queries, keys = batch.queries.copy(), batch.keys.copy()
    queries[..., 0] = 1.0
    position = np.concatenate([np.arange(q_len) for q_len, _ in LENGTHS])
    # sm_scale is D**-0.5, and scores become units of log2 by log2(e).
    ramp = slope * position * HEAD_DIM**0.5 / np.log2(np.e)
    keys[: len(ramp), :, 0] = ramp[:, None]
    return batch.replace(queries=queries, keys=keys)


# With these the first keys alone count, sums grow out of range, and they overflow.
SLOPES = (-10.0, 0.75, 1.5)
# More of the same.
OTHER_SLOPES = (
    pytest.param(slope, marks=pytest.mark.extended) for slope in (-1.0, 10.0)
)


@pytest.mark.parametrize("slope", [*SLOPES, *OTHER_SLOPES])
@pytest.mark.parametrize(
    "q_dtype, with_sinks, options",
    [
        ("bfloat16", False, {}),
        ("bfloat16", True, {"sliding_window": 50}),
        ("float32", True, {"causal": False}),
        pytest.param(
            "bfloat16",
            True,
            {"block_sizes": BlockSizes(decode_block_kv=32, block_q=64, block_kv=64)},
            marks=pytest.mark.extended,
        ),
    ],
    ids=["causal", "window", "full", "four_parts"],
)
def test_scores_may_leave_the_range_of_their_anchor(
    slope, q_dtype, with_sinks, options
):
    """Sums overflow, grow out of range, or are those of the first keys alone."""
    batch = make_batch(slope, q_dtype, with_sinks)
    options = {"block_sizes": SMALL_BLOCKS, "sm_scale": HEAD_DIM**-0.5} | options
    assert_kernel_matches_oracle(batch, **options)

"""The kernel with masks that are neither causal nor full.

Cases are as in test_kernel_numerics.py.
"""

import dataclasses
from typing import Any

import pytest

from jax_kernels.ragged_paged_attention import BlockSizes
from tests.conftest import HAS_TPU
from tests.jax_kernels.test_kernel_numerics import (
    E4M3,
    F32,
    INT8,
    INT8_SCALES,
    Case,
)

# Each case compiles a simulation of its own.
pytestmark = pytest.mark.slow

# Tiles have 32 queries: they begin and end within blocks of positions, or with them.
LENGTHS = ((1, 1), (1, 33), (3, 3), (64, 64), (5, 40), (70, 101), (33, 75))
DECODES = ((4, 4), (1, 30), (3, 64), (2, 34), (0, 0), (1, 1), (4, 66), (3, 50))
# Tiles of 64 queries in parts of 16, blocks of two chunks of 256 tokens.
IN_PARTS: dict[str, Any] = {
    "blocks": BlockSizes(decode_block_kv=64, block_q=64, block_kv=512),
    "lengths": ((70, 70), (25, 600), (105, 410), (1, 300), (64, 257), (60, 284)),
    "page_size": 64,
}


def blocks(size: int, case: Case | None = None, **options) -> Case:
    """A case of causal blocks."""
    case = case or Case(lengths=LENGTHS)
    options = {"causal_block": size, **case.options, **options}
    return dataclasses.replace(case, options=options)


CAUSAL_BLOCKS = {
    "decodes_and_tiles": blocks(
        64, Case(lengths=(*DECODES, (64, 64), (70, 101))), decode_q_len=4
    ),
}
MORE_CAUSAL_BLOCKS = {
    "within_tiles": blocks(8),
    "parts_of_tiles": blocks(32, Case(**IN_PARTS)),
    "decodes_of_four": blocks(4, Case(lengths=DECODES, heads=(8, 2)), decode_q_len=4),
    "over_tiles_f32": blocks(
        64, Case(lengths=LENGTHS, q_dtype=F32, cache_dtype=F32, head_dim=64)
    ),
    "carried": blocks(64, Case(lengths=LENGTHS, cache_dtype=E4M3), chip="v6e"),
    "window": blocks(16, sliding_window=21),
    "window_of_decodes": blocks(
        64, Case(lengths=DECODES, cache_dtype=E4M3), decode_q_len=4, sliding_window=9
    ),
    "cache": blocks(8, attend="cache", return_lse=True),
    "new": blocks(8, attend="new", return_lse=True),
    "without_update": blocks(16, update_kv_cache=False),
    "int8_sinks_soft_cap": blocks(
        128,
        Case(
            lengths=LENGTHS,
            cache_dtype=INT8,
            with_sinks=True,
            options=INT8_SCALES,
            head_dim=64,
        ),
        soft_cap=3.0,
    ),
    "wide": blocks(128, Case(head_dim=256, lengths=((3, 7), (150, 201)), heads=(4, 2))),
    "parts_of_some_queries": blocks(256, Case(**IN_PARTS, heads=(6, 2))),
    "float8_probabilities": blocks(
        64,
        Case(lengths=LENGTHS, cache_dtype=E4M3, page_size=32),
        probabilities_dtype=E4M3,
        chip="tpu7x",
    ),
    "chunks": blocks(
        8,
        Case(lengths=((1, 9), (16, 16), (16, 50), (7, 30))),
        chunk_prefill_size=16,
    ),
}


@pytest.mark.skipif(HAS_TPU, reason="compiles for the TPU there is, not for others")
@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=name) for name, case in CAUSAL_BLOCKS.items()),
        *(
            pytest.param(case, id=name, marks=pytest.mark.extended)
            for name, case in MORE_CAUSAL_BLOCKS.items()
        ),
    ],
)
def test_queries_see_their_own_block_of_positions(case):
    distribution = None
    if case.options.get("decode_q_len"):
        distribution = (len(DECODES), len(DECODES), len(case.lengths))
    if case.options.get("chunk_prefill_size"):
        distribution = (1, 3, 4)
    case.check(distribution=distribution)

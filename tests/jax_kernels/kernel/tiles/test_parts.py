"""Which parts of a tile have something to do, against all pairs one by one."""

import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jax_kernels.ragged_paged_attention.config import (
    AttentionSpec,
    KernelConfig,
    Phase,
    PhaseConfig,
)
from jax_kernels.ragged_paged_attention.kernel.schedule import EMPTY_CELL, Cell
from jax_kernels.ragged_paged_attention.kernel.tiles import parts
from jax_kernels.ragged_paged_attention.layout import CacheLayout

BLOCK_Q, BLOCK_KV, CHUNK = 64, 128, 32


def make_context(
    block_q: int = BLOCK_Q, group: int = 3, dtype: str = "bfloat16", **options
) -> Any:
    """What the functions read of a ``TileContext``."""
    config = KernelConfig(
        spec=AttentionSpec(sm_scale=1.0, **options),
        cache=CacheLayout(4, 16, 1, 128, dtype),
        phases=(),
        num_tokens=256,
        pages_per_sequence=16,
        num_q_heads=group,
        q_dtype=jnp.dtype(dtype),
        out_dtype=jnp.dtype(dtype),
    )
    phase = PhaseConfig(Phase.MIXED, block_q, BLOCK_KV, num_slots=3, lookahead=2)
    return types.SimpleNamespace(config=config, phase=phase)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({}, 4),
        ({"block_q": 256}, 4),
        ({"block_q": 32}, 2),
        ({"dtype": "float32"}, 1),
        ({"group": 1}, 1),
        ({"attend": "cache"}, 1),
        ({"causal": False}, 1),
        ({"sliding_window": 100}, 1),
    ],
)
def test_a_tile_has_parts_where_queries_see_different_keys(arguments, expected):
    context = make_context(**arguments)
    assert parts.number(context) == expected
    assert parts.num_tokens(context) * expected == context.phase.block_q


def test_rows_are_in_order_of_parts_then_heads_then_tokens():
    context = make_context()
    size, num_parts = parts.num_tokens(context), parts.number(context)
    expected = [
        part * size + token
        for part in range(num_parts)
        for _ in range(context.config.group)
        for token in range(size)
    ]
    row = jnp.arange(len(expected), dtype=jnp.int32)
    np.testing.assert_array_equal(parts.token_of_row(context, row), expected)
    for member in range(context.config.group):
        first = parts.first_row(context, 2, member)
        assert expected[first : first + size] == list(range(2 * size, 3 * size))


def cells():
    """Tiles at any place of a block; the last one before a sequence begins."""
    for position in (0, 1, 31, 32, 60, 100, 127, 128, 200, -5):
        for num_queries in (1, 15, 16, 17, 33, 48, 49, 63, 64):
            for block in range(max(position + num_queries - 1, 0) // BLOCK_KV + 1):
                yield EMPTY_CELL._replace(
                    query_position=position,
                    num_queries=num_queries,
                    block=block,
                    block_start=block * BLOCK_KV,
                    visible_end=max(position + num_queries, 0),
                )


def parts_that_see(context: Any, cell: Cell, key: int) -> list[int]:
    """Parts with a query at the key or after it; all those with a query at key 0."""
    tokens = np.arange(cell.num_queries)
    part = tokens // parts.num_tokens(context)
    sees = (cell.query_position + tokens >= key) | (key == 0)
    return sorted(set(part[sees].tolist()))


@pytest.mark.parametrize("block_q", [32, BLOCK_Q])
def test_chunks_are_met_by_the_parts_that_see_them(block_q):
    context = make_context(block_q)
    everything = list(range(parts.number(context)))
    num_met = 0
    for cell in cells():
        if cell.num_queries > block_q:
            continue
        live = parts.with_queries(context, cell.num_queries)
        some = parts.first_chunk_of_some(context, cell, CHUNK)
        for chunk in range(BLOCK_KV // CHUNK):
            key = cell.block_start + chunk * CHUNK
            if key > 0 and key >= cell.visible_end:
                break
            expected = parts_that_see(context, cell, key)
            assert (chunk < some) == (expected == everything), (cell, chunk)
            first = parts.first_that_sees(context, cell, key)
            assert list(range(first, live)) == expected, (cell, chunk)
            num_met += 1
    assert num_met > 100

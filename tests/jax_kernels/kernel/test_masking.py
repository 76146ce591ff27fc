"""Masks against tables that can be read, and against plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_kernels.ragged_paged_attention.config import AttentionSpec
from jax_kernels.ragged_paged_attention.kernel import masking
from jax_kernels.ragged_paged_attention.kernel.schedule import Cell


def mask_of(
    query_positions, key_positions, visible_end, new_start=0, **spec
) -> np.ndarray:
    """bool[queries, keys]; a mask that is the same for every query is one row."""
    queries = jnp.asarray(query_positions, jnp.int32)[:, None]
    attention_spec = AttentionSpec(**spec)
    mask = masking.attention_mask(
        queries,
        jnp.asarray(key_positions, jnp.int32)[None],
        jnp.int32(visible_end),
        jnp.int32(new_start),
        attention_spec,
        attention_spec.seen_end(queries + 1) if "causal_block" in spec else None,
    )
    return np.broadcast_to(mask, (len(query_positions), len(key_positions)))


def table(*rows: str) -> np.ndarray:
    """x where a query (row) sees a key (column)."""
    return np.array([[mark == "x" for mark in row] for row in rows])


@pytest.mark.parametrize(
    "spec, visible_end, expected",
    [
        ({}, 4, table("x...", "xx..", "xxx.", "xxxx")),
        ({"causal": False}, 4, table("xxxx", "xxxx", "xxxx", "xxxx")),
        ({"causal": False}, 3, table("xxx.", "xxx.", "xxx.", "xxx.")),
        ({"causal": False}, 0, table("....", "....", "....", "....")),
        ({"causal_block": 2}, 4, table("xx..", "xx..", "xxxx", "xxxx")),
        ({"causal_block": 2}, 3, table("xx..", "xx..", "xxx.", "xxx.")),
        ({"causal_block": 4}, 3, table("xxx.", "xxx.", "xxx.", "xxx.")),
        (
            {"causal_block": 2, "sliding_window": 1},
            4,
            table("xx..", ".x..", "..xx", "...x"),
        ),
        ({"sliding_window": 1}, 4, table("x...", ".x..", "..x.", "...x")),
        ({"sliding_window": 2}, 4, table("x...", "xx..", ".xx.", "..xx")),
        ({"sliding_window": 9}, 4, table("x...", "xx..", "xxx.", "xxxx")),
        (
            {"sliding_window": 2, "causal": False},
            4,
            table("xxxx", "xxxx", ".xxx", "..xx"),
        ),
        (
            {"sliding_window": 1, "causal": False},
            3,
            table("xxx.", ".xx.", "..x.", "...."),
        ),
    ],
    ids=lambda value: "" if isinstance(value, np.ndarray) else str(value),
)
def test_the_mask_is_the_table(spec, visible_end, expected):
    mask = mask_of(range(4), range(4), visible_end, **spec)
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    "spec, visible_end, expected",
    [
        ({"attend": "new"}, 4, table("x..", "xx.")),
        ({"attend": "new", "causal": False}, 4, table("xx.", "xx.")),
        ({"attend": "new", "sliding_window": 1}, 4, table("x..", ".x.")),
        # The end is that of the keys that were there before.
        ({"attend": "cache"}, 3, table("x..", "x..")),
        ({"attend": "cache", "causal": False}, 2, table("...", "...")),
        ({"attend": "cache", "sliding_window": 2}, 3, table("x..", "...")),
    ],
    ids=lambda value: "" if isinstance(value, np.ndarray) else str(value),
)
def test_parts_of_the_keys_begin_or_end_with_the_new_ones(spec, visible_end, expected):
    """Queries at 2 and 3, which are new or come right after; keys 2 to 4."""
    first = 3 if spec["attend"] == "cache" else 2
    mask = mask_of([first, first + 1], range(2, 5), visible_end, first, **spec)
    np.testing.assert_array_equal(mask, expected)


def test_positions_are_not_int16():
    """Rule 1: 32767 + 1 wraps in int16, and so does a key plus the window."""
    positions = [0, 32_766, 32_767, 32_768, 65_535, 65_536]
    mask = mask_of(positions, positions, 65_537)
    np.testing.assert_array_equal(mask, np.tri(6, dtype=bool))
    mask = mask_of(positions, positions, 65_537, sliding_window=32_768)
    expected = table("x.....", "xx....", "xxx...", ".xxx..", "...xx.", "....xx")
    # 65535 - 32768 < 32768, and 65536 - 32768 = 32768 is one too far.
    np.testing.assert_array_equal(mask, expected)


specs = st.builds(
    lambda masks, **others: AttentionSpec(**masks, **others),
    masks=st.sampled_from(
        [{}, {"causal": False}, {"causal_block": 4}, {"causal_block": 16}]
    ),
    attend=st.sampled_from(["all", "cache", "new"]),
    sliding_window=st.none() | st.integers(1, 40),
)


def make_cell(query_position, num_queries, new_start, block_start, visible_end) -> Cell:
    fields = dict.fromkeys(Cell._fields, 0)
    return Cell(
        **fields
        | {
            "query_position": query_position,
            "num_queries": num_queries,
            "new_start": new_start,
            "block_start": block_start,
            "visible_end": visible_end,
        }
    )


@settings(deadline=None, max_examples=200)
@given(
    spec=specs,
    query_position=st.integers(0, 60),
    num_queries=st.integers(1, 12),
    num_earlier=st.integers(0, 20),
    num_later=st.integers(0, 20),
    block=st.integers(0, 9),
)
def test_only_blocks_that_everybody_sees_go_without_a_mask(
    spec, query_position, num_queries, num_earlier, num_later, block
):
    block_kv = 8
    kv_len = query_position + num_queries + num_later
    size = spec.causal_block or 1
    visible_end = kv_len
    if spec.causal:
        last_block = (query_position + num_queries - 1) // size
        visible_end = min((last_block + 1) * size, kv_len)
    new_start = max(query_position - num_earlier, 0)
    if spec.attend == "cache":
        visible_end = new_start
    cell = make_cell(
        query_position, num_queries, new_start, block * block_kv, visible_end
    )
    sees_all = all(
        key < visible_end
        and (not spec.causal or key // size <= query // size)
        and (spec.attend != "new" or key >= new_start)
        and (spec.sliding_window is None or key > query - spec.sliding_window)
        for query in range(query_position, query_position + num_queries)
        for key in range(cell.block_start, cell.block_start + block_kv)
    )
    assert masking.needs_mask(cell, block_kv, spec) == (not sees_all)


def test_half_of_a_row_is_live():
    """The row packs positions 6 and 7, of which 7 is live: its upper half."""
    mask = masking.live_word_mask(6, 1, 2, jnp.int32(7), jnp.int32(9))
    np.testing.assert_array_equal(mask, np.array([[0xFFFF0000]], np.uint32))


# Eager jnp would be slow.
jitted_word_mask = jax.jit(masking.live_word_mask, static_argnums=(1, 2))


@settings(deadline=None, max_examples=200)
@given(
    packing=st.sampled_from([1, 2, 4]),
    first_row=st.integers(0, 10),
    num_rows=st.sampled_from([1, 12]),
    live_begin=st.none() | st.integers(-3, 60),
    live_end=st.integers(0, 60),
)
def test_word_masks_mark_the_live_tokens(
    packing, first_row, num_rows, live_begin, live_end
):
    first = first_row * packing
    mask = jitted_word_mask(
        jnp.int32(first),
        num_rows,
        packing,
        None if live_begin is None else jnp.int32(live_begin),
        jnp.int32(live_end),
    )
    ones = (1 << (32 // packing)) - 1
    expected = [
        sum(
            ones << (token * 32 // packing)
            for token in range(packing)
            if (live_begin is None or live_begin <= first + row * packing + token)
            and first + row * packing + token < live_end
        )
        for row in range(num_rows)
    ]
    assert mask.dtype == jnp.uint32
    np.testing.assert_array_equal(mask, np.array(expected, np.uint32)[:, None])


@pytest.mark.parametrize("packing", [1, 2, 4])
def test_masks_of_words_by_vectors_are_those_by_scalars(packing):
    """For every token of the rows, and for some that are not in them."""
    for token in range(-2, 8 * packing + 2):
        begin = jnp.int32(token)
        of_one = masking.token_word_mask(begin, 8, packing)
        before = masking.leading_word_mask(begin, 8, packing)
        if token < 0:
            assert not np.asarray(of_one).any() and not np.asarray(before).any()
            continue
        expected = masking.live_word_mask(0, 8, packing, begin, begin + 1)
        np.testing.assert_array_equal(of_one, expected)
        expected = masking.live_word_mask(0, 8, packing, None, begin)
        np.testing.assert_array_equal(before, expected)

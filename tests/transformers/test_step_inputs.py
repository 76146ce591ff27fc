"""The padded tensors of a step say, token by token, what the rows say."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_rpa.scheduling import Request, Row
from torch_rpa.transformers.step_inputs import StepShapes, build_step_inputs

PAGE_SIZE = 4


@st.composite
def steps(draw):
    """Rows as the scheduler makes them, and shapes that hold them."""
    rows, next_page = [], 0
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    for num_tokens in sorted(sizes, key=lambda size: size > 1):
        num_cached = draw(st.integers(0, 10))
        length = num_cached + num_tokens
        num_pages = -(-length // PAGE_SIZE)
        tokens = draw(st.lists(st.integers(3, 99), min_size=length, max_size=length))
        pages = list(range(next_page, next_page + num_pages))
        next_page += num_pages
        pending_row = draw(st.none() | st.integers(0, 4)) if num_tokens == 1 else None
        request = Request(tokens, 1, pages=pages)
        if pending_row is not None:
            request.tokens.pop()
        rows.append(Row(request, num_cached, num_tokens, True, pending_row))
    num_tokens = sum(row.num_tokens for row in rows)
    shapes = StepShapes(
        token_buckets=(num_tokens, num_tokens + draw(st.integers(1, 5))),
        num_sequences=len(rows) + draw(st.integers(0, 3)),
        pages_per_sequence=max(len(row.request.pages) for row in rows)
        + draw(st.integers(0, 2)),
    )
    if draw(st.booleans()):
        shapes = StepShapes(shapes.token_buckets[1:], *list(vars(shapes).values())[1:])
    return rows, shapes


@given(steps())
def test_every_token_is_where_the_operator_looks_for_it(step):
    rows, shapes = step
    inputs = build_step_inputs(rows, shapes)
    batch = inputs.batch
    size, num_seqs = shapes.token_buckets[0], shapes.num_sequences
    assert inputs.input_ids.shape == inputs.position_ids.shape == (1, size)
    assert inputs.last_tokens.shape == batch.kv_lens.shape == (num_seqs,)
    assert batch.cu_q_lens.shape == (num_seqs + 1,)
    page_table = batch.page_indices.view(num_seqs, shapes.pages_per_sequence).tolist()

    index = 0
    for seq, (request, start, num_tokens, _, pending_row) in enumerate(rows):
        assert batch.cu_q_lens[seq] == index
        assert batch.kv_lens[seq] == start + num_tokens
        for position in range(start, start + num_tokens):
            assert inputs.position_ids[0, index] == position
            if pending_row is None:
                assert inputs.pending_rows[0, index] == -1
                assert inputs.input_ids[0, index] == request.tokens[position]
            else:
                assert inputs.pending_rows[0, index] == pending_row
            page = page_table[seq][position // PAGE_SIZE]
            assert page == request.pages[position // PAGE_SIZE]
            index += 1
        assert inputs.last_tokens[seq] == index - 1
    assert batch.cu_q_lens[len(rows) :].tolist() == [index] * (num_seqs - len(rows) + 1)
    num_decodes = sum(row.num_tokens == 1 for row in rows)
    assert batch.distribution.tolist() == [num_decodes, num_decodes, len(rows)]
    assert not inputs.input_ids[0, index:].any()
    assert (inputs.pending_rows[0, index:] == -1).all()
    assert not inputs.position_ids[0, index:].any()
    assert not batch.kv_lens[len(rows) :].any()


def test_the_example_of_the_docstring():
    rows = [
        Row(Request([7, 7, 7, 7], 9, pages=[3, 1]), 4, 1, True, pending_row=1),
        Row(Request([6, 6, 6], 9, pages=[2]), 0, 3, True, None),
    ]
    inputs = build_step_inputs(rows, StepShapes((8,), 3, 2))
    assert inputs.input_ids.tolist() == [[0, 6, 6, 6, 0, 0, 0, 0]]
    assert inputs.pending_rows.tolist() == [[1, -1, -1, -1, -1, -1, -1, -1]]
    assert inputs.position_ids.tolist() == [[4, 0, 1, 2, 0, 0, 0, 0]]
    assert inputs.last_tokens.tolist() == [0, 3, 0]
    assert inputs.batch.kv_lens.tolist() == [5, 3, 0]
    assert inputs.batch.cu_q_lens.tolist() == [0, 1, 4, 4]
    assert inputs.batch.page_indices.tolist() == [3, 1, 2, 0, 0, 0]
    assert inputs.batch.distribution.tolist() == [1, 1, 2]


def test_a_single_token_after_a_longer_row_is_not_in_the_decode_range():
    # A budget can leave one token of a prefill for the last row.
    rows = [
        Row(Request([1, 2], 9, pages=[0]), 0, 2, True, None),
        Row(Request([3, 4], 9, pages=[1]), 0, 1, False, None),
    ]
    inputs = build_step_inputs(rows, StepShapes((8,), 2, 1))
    assert inputs.batch.distribution.tolist() == [0, 0, 2]


def test_the_smallest_bucket_that_fits_is_taken():
    shapes = StepShapes((8, 32), 1, 1)
    assert [shapes.bucket(size) for size in (1, 8, 9, 32)] == [8, 8, 32, 32]
    with pytest.raises(ValueError, match="num_tokens must be at most 32, got 33"):
        shapes.bucket(33)


def test_a_step_without_rows_is_padding_alone():
    inputs = build_step_inputs([], StepShapes((8, 16), 2, 1), size=16)
    assert inputs.input_ids.shape == (1, 16)
    assert inputs.batch.distribution.tolist() == [0, 0, 0]
    assert not inputs.batch.cu_q_lens.any()


@given(steps(), st.integers(0, 30))
def test_padding_shows_the_longest_sequence_and_nothing_else_changes(step, longest):
    rows, shapes = step
    plain = build_step_inputs(rows, shapes)
    sizes = [*shapes.token_buckets, shapes.token_buckets[-1] + 1]
    shapes = dataclasses.replace(shapes, token_buckets=tuple(sizes))
    inputs = build_step_inputs(rows, shapes, longest=longest)
    num_tokens = sum(row.num_tokens for row in rows)
    assert inputs.position_ids.max() + 1 >= longest
    for ours, theirs in (
        (inputs.position_ids[:, :num_tokens], plain.position_ids[:, :num_tokens]),
        (inputs.input_ids[:, :num_tokens], plain.input_ids[:, :num_tokens]),
        (inputs.last_tokens, plain.last_tokens),
        *zip(inputs.batch, plain.batch, strict=True),
    ):
        assert torch.equal(ours, theirs)

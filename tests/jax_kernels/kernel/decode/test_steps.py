"""Steps of decode, judged by plain counting over the lengths of the sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_kernels.contract.options import Attend
from jax_kernels.ragged_paged_attention.config import (
    AttentionSpec,
    KernelConfig,
    Phase,
    PhaseConfig,
)
from jax_kernels.ragged_paged_attention.kernel.decode.steps import (
    DecodeCell,
    Step,
    StepCursor,
    describe_step,
    new_end,
    step_structure,
    tokens_per_step,
)
from jax_kernels.ragged_paged_attention.kernel.schedule import Lengths, Schedule
from jax_kernels.ragged_paged_attention.layout import CacheLayout

BLOCK_KV, PAGE_SIZE, PAGES_PER_SEQUENCE = 8, 8, 8
CACHE_DTYPES = {1: "float32", 2: "bfloat16", 4: "float8_e4m3fn"}
MAX_SEQUENCES = 8


@functools.cache
def make_schedule(
    packing: int = 2,
    window: int | None = None,
    cells_per_step: int = 4,
    update: bool = True,
    page_size: int = PAGE_SIZE,
    decode_q_len: int = 1,
    attend: Attend = "all",
    causal_block: int | None = None,
) -> Schedule:
    bfloat16 = jnp.dtype(jnp.bfloat16)
    config = KernelConfig(
        spec=AttentionSpec(
            sliding_window=window,
            attend=attend,
            causal_block=causal_block,
            update_kv_cache=update,
            decode_q_len=decode_q_len,
        ),
        cache=CacheLayout(4, page_size, 2, 128, CACHE_DTYPES[packing]),
        phases=(),
        num_tokens=64,
        pages_per_sequence=PAGES_PER_SEQUENCE,
        num_q_heads=4,
        q_dtype=bfloat16,
        out_dtype=bfloat16,
    )
    block_q = 1 << (decode_q_len - 1).bit_length()
    return Schedule(
        config, PhaseConfig(Phase.DECODE, block_q, BLOCK_KV, 4, 2, cells_per_step)
    )


def steps_of(schedule: Schedule, sequences: list[tuple[int, int]]) -> list[Step]:
    """All steps of sequences given as (q_len, kv_len)."""
    starts = np.cumsum([0] + [q_len for q_len, _ in sequences]).tolist()

    def read_lengths(sequence: int) -> Lengths:
        return Lengths(starts[sequence], *sequences[sequence])

    steps, cursor = [], StepCursor(0, 0)
    while cursor.sequence < len(sequences):
        step, cursor = describe_step(schedule, cursor, len(sequences), read_lengths)
        steps.append(step)
        assert len(steps) < 1000
    return steps


def row_begin(cell: DecodeCell) -> int:
    return cell.row_begin or 0


def has_new_token(cell: DecodeCell) -> bool:
    return cell.new_place is not None and cell.new_place >= 0


def cells_of(schedule: Schedule, sequences) -> list[DecodeCell]:
    return [cell for step in steps_of(schedule, sequences) for cell in step.cells]


def test_the_example_of_the_module():
    first, second = steps_of(make_schedule(), [(1, 5), (1, 20), (1, 6), (1, 9)])
    assert [cell.visible_end for cell in first.cells] == [5, 20, 12, 4]
    assert [cell.num_before for cell in first.cells] == [0, 0, 8, 16]
    assert [cell.query for cell in first.cells] == [0, 1, 1, 1]
    assert (first.first_token, first.num_tokens, first.num_ended) == (0, 2, 2)
    assert [cell.visible_end for cell in second.cells] == [6, 9, 1, 0]
    assert (second.first_token, second.num_tokens, second.num_ended) == (2, 2, 2)
    assert (first.extent, second.extent) == (20, 9)
    # Past the end: no rows, and an output that is never sent.
    last = second.cells[3]
    assert (last.row_end, last.new_place, last.query) == (0, -1, 4)


def test_an_unfinished_sequence_sends_its_output_from_a_later_step():
    first, second = steps_of(make_schedule(), [(1, 3), (1, 40)])
    assert (first.num_tokens, first.num_ended) == (2, 1)
    # The query is fetched again, and the output starts with it.
    assert (second.first_token, second.num_tokens, second.num_ended) == (1, 1, 1)
    assert [cell.query for cell in second.cells[:2]] == [0, 0]


def test_a_sequence_without_a_query_takes_a_cell_and_no_token():
    (step,) = steps_of(make_schedule(), [(1, 3), (0, 7), (1, 4)])
    assert (step.num_tokens, step.num_ended) == (2, 2)
    assert [cell.query for cell in step.cells[:3]] == [0, 4, 1]
    assert step.cells[1].row_end == 0


def test_blocks_smaller_than_a_page_start_within_it():
    schedule = make_schedule(page_size=16)
    places = [cell.place for cell in cells_of(schedule, [(1, 5), (1, 20)])][:4]
    assert places == [(0, 0), (8, 0), (8, 4), (9, 0)]


def test_a_window_skips_the_blocks_before_it():
    """70,001 tokens and a window of 20: four blocks of 8. Numbers pass int16."""
    (step,) = steps_of(make_schedule(window=20), [(1, 70_001)])
    pages = [cell.place.table_index for cell in step.cells]
    assert pages == [8747, 8748, 8749, 8750]  # from 69,976 on
    assert [cell.visible_begin for cell in step.cells] == [5, -3, -11, -19]
    assert [cell.visible_end for cell in step.cells] == [25, 17, 9, 1]
    assert [cell.new_place for cell in step.cells] == [-1, -1, -1, 0]


@pytest.mark.parametrize("window", [None, 20, BLOCK_KV])
def test_new_tokens_alone_are_one_block_from_their_page_on(window):
    schedule = make_schedule(window=window, attend="new")
    (step,) = steps_of(schedule, [(1, 70_001), (1, 8), (1, 1)])
    cells = step.cells[:3]
    assert [cell.place.table_index for cell in cells] == [8750, 8, 16]
    assert [cell.row_begin for cell in cells] == [0, 3, 0]
    assert [cell.row_end for cell in cells] == [1, 4, 1]
    assert [cell.visible_begin for cell in cells] == [0, 7, 0]
    assert [cell.visible_end for cell in cells] == [1, 8, 1]
    assert [cell.new_place for cell in cells] == [0, 7, 0]


def test_a_block_as_long_as_the_window_begins_with_it():
    """Every sequence has one cell, at the packed row of the first visible token."""
    schedule = make_schedule(window=BLOCK_KV)
    (step,) = steps_of(schedule, [(1, 70_001), (1, 5), (0, 3), (1, 16)])
    # Rows of two tokens, four to a page: 69,993 is the second one of its row.
    places = [cell.place for cell in step.cells]
    assert places == [(8749, 0), (8, 0), (16, 0), (25, 0)]
    assert [cell.visible_end for cell in step.cells] == [9, 5, 0, 8]
    assert [cell.row_end for cell in step.cells] == [5, 3, 0, 4]
    assert [cell.new_place for cell in step.cells] == [8, 4, -1, 7]
    assert (step.num_rows, step.num_written, step.num_ended) == (12, 3, 3)


@pytest.mark.parametrize(
    "packing, cells_per_step, update",
    [(1, 4, True), (2, 4, True), (4, 4, True), (2, 1, True), (2, 4, False)],
)
@settings(deadline=None, max_examples=40)
@given(
    sequences=st.lists(
        st.tuples(st.integers(0, 1), st.integers(1, 32)),
        min_size=1,
        max_size=MAX_SEQUENCES,
    ),
    window=st.sampled_from([None, 5, BLOCK_KV]),
)
def test_every_visible_token_is_met_once(
    packing, cells_per_step, update, sequences, window
):
    schedule = make_schedule(packing, window, cells_per_step, update)
    steps = steps_of(schedule, sequences)
    cells = [cell for step in steps for cell in step.cells]
    for step in steps:
        assert step.num_rows == sum(c.row_end - row_begin(c) for c in step.cells)
        assert step.num_written == sum(has_new_token(c) for c in step.cells)
        assert step.extent == max(c.visible_end for c in step.cells)
        assert 0 <= step.num_ended <= step.num_tokens <= cells_per_step

    # The outputs that are sent are all tokens, in order, each once.
    sent = [step.first_token + i for step in steps for i in range(step.num_ended)]
    assert sent == list(range(sum(q_len for q_len, _ in sequences)))

    met: dict[int, list[int]] = {}
    written: dict[int, list[int]] = {}
    for step in steps:
        for cell in step.cells:
            token = step.first_token + cell.query
            first_page = cell.place.table_index % PAGES_PER_SEQUENCE
            start = first_page * PAGE_SIZE + (cell.place.page_row or 0) * packing
            begin = max(cell.visible_begin or 0, 0)
            end = cell.visible_end
            if schedule.cell_is_window:
                # What is behind the block takes the place of what is before the window.
                begin = max(end - BLOCK_KV, 0)
                assert end <= schedule.cell_rows * packing
                assert begin < packing
            else:
                end = min(end, BLOCK_KV)
            if cell.query < cells_per_step:
                met.setdefault(token, []).extend(range(start + begin, start + end))
                # What is seen is fetched or new, whole packed rows at a time.
                for position in range(begin, end):
                    row = position // packing
                    is_fetched = row_begin(cell) <= row < cell.row_end
                    assert is_fetched or position == cell.new_place
            if has_new_token(cell):
                row = cell.new_place // packing
                # The other tokens of the row must be there to be written back.
                assert row_begin(cell) <= row < cell.row_end
                written.setdefault(token, []).append(start + cell.new_place)

    live = [kv_len for q_len, kv_len in sequences if q_len]
    for token, kv_len in enumerate(live):
        assert met[token] == list(
            range(max(kv_len - window, 0) if window else 0, kv_len)
        )
    expected = {token: [kv_len - 1] for token, kv_len in enumerate(live)}
    assert written == (expected if update else {})
    assert len(cells) == len(steps) * cells_per_step


def test_new_tokens_that_straddle_a_block_are_in_two_cells():
    schedule = make_schedule(decode_q_len=4)
    (step,) = steps_of(schedule, [(4, 10), (2, 3)])
    first, second, third = step.cells[:3]
    assert [cell.num_queries for cell in step.cells] == [4, 4, 2, 0]
    assert (first.new_place, new_end(schedule.phase, first)) == (6, 8)
    assert (second.new_place, new_end(schedule.phase, second)) == (0, 2)
    assert (third.new_place, new_end(schedule.phase, third)) == (1, 3)
    assert (step.num_tokens, step.num_ended) == (6, 6)
    # Rows of two tokens: 6 and 7, then 0 and 1, then 0 to 3.
    assert step.num_written == 1 + 1 + 2


@pytest.mark.parametrize("window", [None, 9])
def test_first_queries_have_places_in_blocks_of_positions(window):
    """Whatever the start of a cell, which a window moves."""
    schedule = make_schedule(decode_q_len=4, causal_block=16, window=window)
    cells = cells_of(schedule, [(4, 45), (3, 3), (2, 34)])
    places = {
        cell.place.table_index // PAGES_PER_SEQUENCE: cell.place_in_causal_block
        for cell in cells
        if cell.num_queries
    }
    assert places == {0: 41 % 16, 1: 0, 2: 32 % 16}
    (first, *_) = cells_of(make_schedule(causal_block=16), [(1, 5)])
    assert first.place_in_causal_block is None  # its query sees all


@pytest.mark.parametrize("packing", [1, 2, 4])
@settings(deadline=None, max_examples=40)
@given(
    decode_q_len=st.sampled_from([2, 3, 8]),
    lengths=st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 30)),
        min_size=1,
        max_size=MAX_SEQUENCES,
    ),
    window=st.sampled_from([None, 5]),
)
def test_several_new_tokens_are_sent_and_written_once(
    packing, decode_q_len, lengths, window
):
    sequences = []
    for q_len, num_old in lengths:
        q_len = min(q_len, decode_q_len)
        sequences.append((q_len, q_len + num_old))
    schedule = make_schedule(packing, window, decode_q_len=decode_q_len)
    steps = steps_of(schedule, sequences)
    sent, met, written = [], set(), []
    for step in steps:
        assert step.num_tokens <= tokens_per_step(schedule.phase)
        sent += range(step.first_token, step.first_token + step.num_ended)
        num_written = 0
        for cell in step.cells:
            start = cell.place.table_index % PAGES_PER_SEQUENCE * PAGE_SIZE
            sequence = cell.place.table_index // PAGES_PER_SEQUENCE
            end = new_end(schedule.phase, cell)
            begin = max(cell.visible_begin or 0, 0)
            if cell.num_queries:
                assert cell.query + cell.num_queries <= step.num_tokens
                met |= {(sequence, start + place) for place in range(begin, end)}
            # All rows with a visible token are fetched, those of new tokens too.
            assert row_begin(cell) * packing <= begin or end <= begin
            assert cell.row_end * packing >= end or not cell.num_queries
            if cell.new_place >= 0:
                written += [(sequence, start + i) for i in range(cell.new_place, end)]
                num_written += -(-end // packing) - cell.new_place // packing
        assert step.num_written == num_written
    assert sent == list(range(sum(q_len for q_len, _ in sequences)))
    new = [(q, kv, s) for s, (q, kv) in enumerate(sequences) if q]
    assert written == [(s, i) for q, kv, s in new for i in range(kv - q, kv)]
    assert met == {
        (s, i)
        for q, kv, s in new
        for i in range(max(kv - q - window + 1, 0) if window else 0, kv)
    }


@pytest.mark.slow
@pytest.mark.parametrize("update", [True, False], ids=["update", "no_update"])
def test_traced_steps_are_those_of_plain_ints(update):
    """The kernel traces what the other tests run in Python."""
    sequences = [(1, 5), (0, 7), (1, 20), (1, 30), (1, 9)]
    schedule = make_schedule(packing=4, window=9, update=update)
    starts, kv_lens = jnp.array([0, 1, 1, 2, 3, 4]), jnp.array([5, 7, 20, 30, 9])

    @jax.jit
    def traced(cursor):
        def read_lengths(sequence):
            start = starts[sequence]
            return Lengths(start, starts[sequence + 1] - start, kv_lens[sequence])

        return describe_step(schedule, cursor, jnp.int32(5), read_lengths)

    cursor = StepCursor(0, 0)
    steps = steps_of(schedule, sequences)
    assert all(type(number) is int for number in jax.tree.leaves(steps))
    for plain in steps:
        step, cursor = traced(cursor)
        assert jax.tree.map(int, step) == plain


def test_a_step_is_kept_as_a_flat_list_of_numbers():
    (step,) = steps_of(make_schedule(), [(1, 5)])
    structure = step_structure(make_schedule())
    assert jax.tree.structure(step) == structure
    assert jax.tree.unflatten(structure, jax.tree.leaves(step)) == step

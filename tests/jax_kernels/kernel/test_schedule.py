"""The list of cells, walked one by one and judged by plain counting.

``judge`` knows what attention needs and what a DMA pipeline may do, and nothing of how
the schedule computes it. The blocks are tiny, so that short sequences have many cells.
"""

import dataclasses

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
from jax_kernels.ragged_paged_attention.kernel import masking
from jax_kernels.ragged_paged_attention.kernel.schedule import (
    Cell,
    Cursor,
    Lengths,
    RecentBlock,
    Schedule,
)
from jax_kernels.ragged_paged_attention.layout import CacheLayout

NUM_SLOTS = 4
CACHE_DTYPES = {1: "float32", 2: "bfloat16", 4: "float8_e4m3fn"}


def make_schedule(
    *,
    packing: int = 2,
    page_size: int = 8,
    block_q: int = 4,
    block_kv: int = 8,
    causal: bool = True,
    block: int | None = None,
    window: int | None = None,
    update: bool = True,
    attend: Attend = "all",
) -> Schedule:
    config = KernelConfig(
        spec=AttentionSpec(
            causal=causal,
            causal_block=block,
            sliding_window=window,
            attend=attend,
            update_kv_cache=update,
        ),
        cache=CacheLayout(4, page_size, 2, 128, CACHE_DTYPES[packing]),
        phases=(),
        num_tokens=64,
        pages_per_sequence=8,
        num_q_heads=4,
        q_dtype=jnp.dtype(jnp.bfloat16),
        out_dtype=jnp.dtype(jnp.bfloat16),
    )
    return Schedule(config, PhaseConfig(Phase.MIXED, block_q, block_kv, NUM_SLOTS, 2))


@dataclasses.dataclass
class Walk:
    """All cells of a batch, what each was described from, and if it needs a mask."""

    cells: list[Cell]
    arguments: list[tuple]
    is_masked: list[bool]


def walk(
    schedule: Schedule, sequences: list[tuple[int, int]], *, carries: bool = False
) -> Walk:
    """Follows the cursor from the first sequence to the end.

    Args:
      schedule: The schedule.
      sequences: (q_len, kv_len) of each.
      carries: Whether packed tokens are copied from slot to slot.
    """
    starts = np.cumsum([0] + [q_len for q_len, _ in sequences]).tolist()
    found = Walk([], [], [])
    cursor = Cursor(0, 0, 0)
    while cursor.sequence < len(sequences):
        q_len, kv_len = sequences[cursor.sequence]
        lengths = Lengths(starts[cursor.sequence], q_len, kv_len)
        stored_end = _stored_end(schedule, found.cells, cursor.sequence)
        recent = _recent_blocks(found.cells) if carries else ()
        arguments = (cursor, lengths, stored_end, recent)
        cell = schedule.describe(*arguments)
        found.cells.append(cell)
        found.arguments.append(arguments)
        found.is_masked.append(
            masking.needs_mask(cell, schedule.phase.block_kv, schedule.config.spec)
        )
        previous, cursor = cursor, schedule.advance(cell)
        assert cursor > previous, f"{previous} -> {cursor}"
        assert len(found.cells) < 10_000
    return found


def _stored_end(schedule: Schedule, cells: list[Cell], sequence: int) -> int:
    """Where the writes of a sequence stand that have ended before the next cell.

    The slot of the next cell was that of the cell ``NUM_SLOTS`` before. Its write-back
    was awaited, and so were all earlier ones.
    """
    packing = schedule.config.cache.packing
    stored_end = 0
    for i in reversed(range(len(cells) + 1 - NUM_SLOTS)):
        c = cells[i]
        if c.sequence != sequence:
            break
        if c.write_row_end > c.write_row_begin:
            stored_end = max(stored_end, c.block_start + c.write_row_end * packing)
    return stored_end


def _recent_blocks(cells: list[Cell]) -> list[RecentBlock]:
    """What the slots hold that are not yet filled again, the last one first."""
    recent = [
        RecentBlock(c.sequence, c.block_start, c.new_end)
        for c in reversed(cells[-(NUM_SLOTS - 1) :])
    ]
    none = RecentBlock(-1, 0, 0)
    return recent + [none] * (NUM_SLOTS - 1 - len(recent))


def judge(schedule: Schedule, sequences: list[tuple[int, int]], found: Walk) -> None:
    """Asserts everything that the kernel relies on."""
    starts = np.cumsum([0] + [q_len for q_len, _ in sequences])
    for s, (q_len, kv_len) in enumerate(sequences):
        indices = [i for i, cell in enumerate(found.cells) if cell.sequence == s]
        assert indices, f"sequence {s} has no cell: the loop would not pass it"
        if q_len == 0 or kv_len == 0:
            for i in indices:
                assert_idle(found.cells[i], kv_len)
        if q_len and kv_len:
            judge_sequence(schedule, int(starts[s]), q_len, kv_len, indices, found)


def assert_idle(cell: Cell, kv_len: int) -> None:
    """Moves no keys and no values."""
    assert kv_len == 0 or cell.num_queries == 0
    assert cell.cache_row_begin == cell.cache_row_end
    assert cell.new_begin == cell.new_end
    assert cell.write_row_begin == cell.write_row_end
    assert cell.tail_row == -1


def judge_sequence(schedule, q_start, q_len, kv_len, indices, found) -> None:
    spec, packing = schedule.config.spec, schedule.config.cache.packing
    block_kv, block_q = schedule.phase.block_kv, schedule.phase.block_q
    new_start = kv_len - q_len
    query, key = np.arange(new_start, kv_len)[:, None], np.arange(kv_len)[None]
    visible = np.ones((q_len, kv_len), bool)
    if spec.causal_block is not None:
        visible &= key // spec.causal_block <= query // spec.causal_block
    elif spec.causal:
        visible &= key <= query
    if spec.sliding_window is not None:
        visible &= key > query - spec.sliding_window
    if spec.attend == "cache":
        visible &= key < new_start
    elif spec.attend == "new":
        visible &= key >= new_start
    times_attended = np.zeros((q_len, kv_len), int)
    num_rows = -(-kv_len // packing)
    row_is_new = (np.arange(num_rows) + 1) * packing > new_start
    times_written = np.zeros(num_rows, int)
    written_at = np.full(num_rows, -1)
    next_query = new_start
    merged_at: dict[int, set[int]] = {}

    for i in indices:
        cell = found.cells[i]
        # Tiles cut the new tokens into pieces, in order.
        assert 0 < cell.num_queries <= block_q
        assert cell.query_token == q_start + cell.query_position - new_start
        if cell.block == 0:
            assert cell.query_position == next_query
            next_query += cell.num_queries
        assert cell.query_position + cell.num_queries == next_query

        rows = slice(cell.query_position - new_start, next_query - new_start)
        block = slice(cell.block_start, min(cell.block_start + block_kv, kv_len))
        seen = visible[rows, block]
        times_attended[rows, block] += seen
        may_only_write = spec.attend == "cache" and spec.update_kv_cache
        is_only = cell.num_blocks == 1 and not visible[rows].any()
        assert seen.any() or may_only_write or is_only, f"nobody sees it: {cell}"
        is_partial = not seen.all() or block.stop < cell.block_start + block_kv
        assert found.is_masked[i] or not is_partial, f"needs a mask: {cell}"

        first_row = cell.block_start // packing
        assert cell.block_start % packing == 0
        fetched = set(
            range(first_row + cell.cache_row_begin, first_row + cell.cache_row_end)
        )
        if cell.tail_row >= 0:
            assert first_row + cell.tail_row not in fetched
            fetched.add(first_row + cell.tail_row)
        in_block = range(first_row, first_row + block_kv // packing)
        assert fetched <= set(in_block)
        # Only rows with a live token, so only live pages: never a dead row, nor one
        # that lies before the window of the tile.
        first_seen = cell.visible_begin
        if seen.any():
            first_seen = cell.block_start + int(seen.any(axis=0).argmax())
        for row in fetched:
            assert row < num_rows, f"dead row {row}: {cell}"
            assert (row + 1) * packing > first_seen, f"row before the window: {cell}"
        # No row on its way to memory is read.
        for row in fetched:
            assert not (written_at[row] >= 0 and written_at[row] > i - NUM_SLOTS), (
                f"row {row} is read by cell {i} while cell {written_at[row]} writes it"
            )

        carried = range(cell.carried_begin, cell.new_begin)
        if carried:
            # From the slot of the last cell with the same block, which is still whole.
            merged = next(
                merged_at[earlier]
                for earlier in range(i - 1, i - NUM_SLOTS, -1)
                if found.cells[earlier].sequence == cell.sequence
                and found.cells[earlier].block_start == cell.block_start
            )
            assert set(carried) <= merged
        new = range(cell.new_begin, cell.new_end)
        merged_at[i] = {*carried, *new}
        assert not new or (new_start <= new[0] and new[-1] < block.stop)
        assert not new or new[0] >= cell.block_start

        def source_of(
            position,
            cell=cell,
            fetched=fetched,
            new=new,
            carried=carried,
            is_stored=written_at >= 0,
        ) -> str:
            """Where the buffer has a position from, after merge and seam."""
            row = position // packing
            if position in new:
                return "new"
            if position in carried:
                return "carried"
            seam_row = new_start // packing
            has_seam = new_start % packing != 0
            if has_seam and row == seam_row and cell.tile > 0:
                return "seam"
            if row in fetched:
                is_new = spec.update_kv_cache and new_start <= position < kv_len
                return "cache" if not is_new or is_stored[row] else "stale"
            return "nowhere"

        for position in np.flatnonzero(seen.any(axis=0)) + cell.block_start:
            source = source_of(int(position))
            assert source in ("new", "carried", "cache", "seam"), (
                f"{position} {source}: {cell}"
            )

        write = range(first_row + cell.write_row_begin, first_row + cell.write_row_end)
        assert set(write) <= set(in_block)
        for row in write:
            for position in range(row * packing, (row + 1) * packing):
                is_new = new_start <= position < kv_len
                source = source_of(position)
                # An earlier tile of causal blocks may have packed what this one owns.
                assert source in (("new", "carried") if is_new else ("cache",)), (
                    f"writes {position} from {source}: {cell}"
                )
        times_written[list(write)] += 1
        written_at[list(write)] = i

    assert next_query == kv_len
    np.testing.assert_array_equal(times_attended, visible)
    expected_writes = row_is_new if spec.update_kv_cache else np.zeros(num_rows)
    np.testing.assert_array_equal(times_written, expected_writes)


def check(
    schedule: Schedule, sequences: list[tuple[int, int]], *, carries: bool = False
) -> Walk:
    found = walk(schedule, sequences, carries=carries)
    judge(schedule, sequences, found)
    return found


STATIC_CASES = {
    "f32": {"packing": 1},
    "bf16": {},
    "e4m3": {"packing": 4},
    "e4m3_small_tiles": {"packing": 4, "block_q": 4, "block_kv": 16},
    "page_larger_than_block": {"page_size": 32},
    "block_larger_than_page": {"block_kv": 32, "block_q": 8},
    "block_kv_larger_than_tile": {"block_q": 16, "block_kv": 8, "page_size": 16},
    "full": {"causal": False},
    "full_e4m3": {"causal": False, "packing": 4},
    "blocks_of_2": {"block": 2, "packing": 4},
    "blocks_as_tiles": {"block": 4, "packing": 1},
    "blocks_over_tiles": {"block": 16, "packing": 4, "block_kv": 16},
    "blocks_over_all": {"block": 64, "page_size": 16},
    "blocks_of_a_window": {"block": 8, "window": 5, "page_size": 16},
    "blocks_cache": {"block": 8, "attend": "cache"},
    "blocks_new_e4m3": {"block": 8, "attend": "new", "packing": 4},
    "blocks_no_update": {"block": 8, "update": False},
    "window_of_1": {"window": 1},
    "window_within_page": {"window": 5, "page_size": 16},
    "window_across_blocks": {"window": 19, "packing": 4},
    "window_with_large_page": {"window": 19, "page_size": 64},
    "window_full": {"window": 10, "causal": False},
    "cache": {"attend": "cache"},
    "cache_full_e4m3": {"attend": "cache", "causal": False, "packing": 4},
    "cache_of_a_window": {"attend": "cache", "window": 5},
    "cache_no_update": {"attend": "cache", "update": False},
    "new": {"attend": "new"},
    "new_full_e4m3": {"attend": "new", "causal": False, "packing": 4},
    "new_of_a_window": {"attend": "new", "window": 5, "page_size": 16},
    "new_no_update": {"attend": "new", "update": False},
    "no_update": {"update": False},
    "no_update_full_window": {"update": False, "causal": False, "window": 7},
}


@st.composite
def chunks(draw):
    """(q_len, kv_len), q_len <= kv_len, either possibly zero; or (q_len, 0)."""
    kv_len = draw(st.integers(0, 70))
    q_len = draw(st.integers(0, min(kv_len, 40) if kv_len else 9))
    return q_len, kv_len


@pytest.mark.slow
@pytest.mark.parametrize("static", STATIC_CASES.values(), ids=STATIC_CASES)
@settings(deadline=None, max_examples=80)
@given(sequences=st.lists(chunks(), min_size=1, max_size=3), carries=st.booleans())
def test_mixed_cells_cover_every_pair_once_and_never_race(static, sequences, carries):
    check(make_schedule(**static), sequences, carries=carries)


@pytest.mark.parametrize(
    "lengths",
    [[1], [7], [8], [9], [0, 1, 0, 7, 8, 9, 0], [0, 0, 0], [9] * 20],
    ids=str,
)
def test_empty_and_short_sequences_in_any_order(lengths):
    """Rule 4: an empty sequence is one idle cell, so nobody waits for it."""
    found = check(make_schedule(), list(zip(lengths, lengths, strict=True)))
    for s, length in enumerate(lengths):
        if length == 0:
            assert sum(cell.sequence == s for cell in found.cells) == 1


def test_the_worked_example_of_the_docstring():
    """Rows are counted from the block: row 2 of cell 3 is the tail 12 | 13."""
    cells = walk(make_schedule(), [(6, 13), (1, 3)]).cells

    def rows_fetched(cell):
        tail = [cell.tail_row] if cell.tail_row >= 0 else []
        return [*range(cell.cache_row_begin, cell.cache_row_end), *tail]

    table = [
        (
            (cell.sequence, cell.tile, cell.block),
            (cell.query_position, cell.query_position + cell.num_queries),
            rows_fetched(cell),
            (cell.new_begin, cell.new_end),
            [*range(cell.write_row_begin, cell.write_row_end)],
        )
        for cell in cells
    ]
    assert table == [
        ((0, 0, 0), (7, 10), [0, 1, 2, 3], (7, 8), [3]),
        ((0, 0, 1), (7, 10), [], (8, 10), [0]),
        ((0, 1, 0), (10, 13), [0, 1, 2], (7, 8), []),
        ((0, 1, 1), (10, 13), [2], (8, 13), [1, 2]),
        ((1, 0, 0), (2, 3), [0, 1], (2, 3), [1]),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "static",
    [
        "f32",
        "e4m3",
        "full",
        "blocks_over_tiles",
        "window_across_blocks",
        "window_full",
        "no_update",
    ],
)
def test_traced_cells_are_those_of_plain_ints(static):
    """The kernel traces what the other tests run in Python."""
    sequences = [(21, 45), (0, 0), (21, 24), (21, 0), (0, 9)]
    schedule = make_schedule(**STATIC_CASES[static])
    found = walk(schedule, sequences, carries=True)

    @jax.jit
    @jax.vmap
    def traced(arguments):
        cell = schedule.describe(*arguments)
        return (
            jax.tree.map(jnp.int32, cell),
            schedule.advance(cell),
            masking.needs_mask(cell, schedule.phase.block_kv, schedule.config.spec),
        )

    plain = [
        (cell, schedule.advance(cell), is_masked)
        for cell, is_masked in zip(found.cells, found.is_masked, strict=True)
    ]
    assert all(type(x) is int for x in jax.tree.leaves([row[:2] for row in plain]))
    assert all(type(is_masked) is bool for is_masked in found.is_masked)
    columns = jax.tree.map(lambda *x: jnp.array(x, jnp.int32), *found.arguments)
    jax.tree.map(
        np.testing.assert_array_equal,
        traced(columns),
        jax.tree.map(lambda *x: np.array(x), *plain),
    )


def test_a_window_skips_the_blocks_before_it():
    """10000 tokens and a window of 20: 3 blocks of 8 at the most, not 1250."""
    found = check(make_schedule(window=20), [(1, 10_000)])
    assert len(found.cells) <= 4
    assert all(cell.block_start >= 10_000 - 20 - 8 for cell in found.cells)


def test_a_causal_tile_skips_the_blocks_after_it():
    cells = check(make_schedule(), [(32, 32)]).cells
    blocks_of_tile = [sum(c.tile == tile for c in cells) for tile in range(8)]
    assert blocks_of_tile == [1, 1, 2, 2, 3, 3, 4, 4]


def test_later_tiles_read_stored_tokens_from_the_cache():
    """Otherwise long chunks would fetch and pack the same tokens again and again."""
    found = check(make_schedule(), [(64, 64)])
    last = [c for c in found.cells if c.tile == found.cells[-1].tile]
    from_arrays = sum(c.new_end - c.new_begin for c in last)
    from_cache = sum(c.cache_row_end - c.cache_row_begin for c in last) * 2
    assert from_cache >= 40 and from_arrays <= 24


@pytest.mark.parametrize("lengths", [(30, 30), (25, 31), (12, 15)], ids=str)
@pytest.mark.parametrize("packing", [2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_each_new_token_is_packed_once_if_later_cells_carry_it(
    lengths, packing, causal
):
    schedule = make_schedule(packing=packing, block_kv=16, causal=causal)
    found = check(schedule, [lengths], carries=True)
    assert sum(c.new_end - c.new_begin for c in found.cells) == lengths[0]
    again = check(schedule, [lengths])
    assert sum(c.new_end - c.new_begin for c in again.cells) > lengths[0]


def test_positions_beyond_int16_stay_exact():
    """Rule 1."""
    found = check(make_schedule(window=100), [(1, 70_001)])
    assert found.cells[-1].visible_end == 70_001
    assert found.cells[0].visible_begin == 69_901

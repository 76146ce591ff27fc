"""Steps of decode: some consecutive cells, and what their sequences have in common.

A sequence has up to ``decode_q_len`` new tokens, which are all in each of its cells.

A step is ``cells_per_step`` consecutive cells of the flat list (schedule.py), of one
sequence or of several. Its DMAs, waits and matmuls are those of one large cell, so
that many short sequences cost hardly more than a long one. With blocks of 8 tokens and
4 cells in a step, sequences of 5, 20, 6 and 9 tokens make two steps::

    step  cell  sequence  block  keys       ends
    0     0     0         0      0 .. 4     yes
          1     1         0      0 .. 7
          2     1         1      8 .. 15
          3     1         2      16 .. 19   yes
    1     0     2         0      0 .. 5     yes
          1     3         0      0 .. 7
          2     3         1      8          yes
          3     -

All functions are arithmetic on scalars (ints.py), as in schedule.py, of which this is
the case of decode: one tile for each sequence, all rows read from the cache, and as few
operations for a cell as can be, since the scalar unit plans a step while it starts the
copies of another.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jax_kernels.ragged_paged_attention.config import PhaseConfig
from jax_kernels.ragged_paged_attention.kernel import ints
from jax_kernels.ragged_paged_attention.kernel.ints import Int, floor_to, log2
from jax_kernels.ragged_paged_attention.kernel.schedule import (
    BlockPlace,
    Lengths,
    Schedule,
)


class StepCursor(NamedTuple):
    """A place in the list of cells."""

    sequence: Int
    num_before: Int  # tokens of the sequence that earlier cells have


class DecodeCell(NamedTuple):
    """One block of a sequence. Tokens and rows count from the start of the block.

    What is the same for all cells of a phase is None.
    """

    place: BlockPlace  # page_row None: blocks start with a page
    row_begin: Int | None  # rows fetched; None: from the first one on
    row_end: Int
    visible_begin: Int | None  # tokens that some query sees; None: from the first on
    visible_end: Int  # may be out of the block, as the begin; after the last that is
    # seen or kept
    new_place: Int  # where the first new token goes, or -1; None: none is kept
    query: Int  # number of its first query among those of the step; past them if none
    num_before: Int | None  # 0: the first block of its sequence; None: the only one
    num_queries: Int | None  # None: one, if it has any
    place_in_causal_block: Int | None  # of its first query; None: there are no such
    # blocks, or one query, which sees all keys


class Step(NamedTuple):
    """Cells that are fetched and computed together."""

    cells: tuple[DecodeCell, ...]
    first_token: Int  # of the first cell, in the flat query array
    num_tokens: Int  # queries, new keys and new values to fetch
    num_ended: Int  # queries of the sequences that end in the step
    num_rows: Int  # rows fetched
    num_written: Int  # rows written back
    extent: Int  # tokens that the longest cell sees; may be out of the block


def cell_structure(schedule: Schedule) -> Any:
    """How the numbers of a cell are laid out: a tree of JAX."""
    spec, phase = schedule.config.spec, schedule.phase
    is_one_cell = schedule.cell_is_window
    has_begin = spec.hides_first_keys and not is_one_cell
    cell = DecodeCell(
        place=BlockPlace(0, 0 if _starts_within_page(schedule) else None),
        row_begin=0 if has_begin else None,
        row_end=0,
        visible_begin=0 if has_begin else None,
        visible_end=0,
        new_place=0 if spec.update_kv_cache else None,
        query=0,
        num_before=None if is_one_cell else 0,
        num_queries=None if phase.block_q == 1 else 0,
        place_in_causal_block=0 if _has_causal_blocks(schedule) else None,
    )
    return jax.tree.structure(cell)


def step_structure(schedule: Schedule) -> Any:
    """How the numbers of a step are laid out: those of its cells come first."""
    structure = cell_structure(schedule)
    cell = jax.tree.unflatten(structure, range(structure.num_leaves))
    totals = [0] * (len(Step._fields) - 1)
    return jax.tree.structure(Step((cell,) * schedule.phase.cells_per_step, *totals))


def describe_step(
    schedule: Schedule,
    cursor: StepCursor,
    end: Int,
    read_lengths: Callable[[Int], Lengths],
    keep: Callable[[int, DecodeCell], None] = lambda index, cell: None,
) -> tuple[Step, StepCursor]:
    """The step that starts at a cursor, and the cursor of the next one.

    Args:
      schedule: Cell arithmetic.
      cursor: The first cell.
      end: The sequence after the last one. Cells there have no query and no rows.
      read_lengths: Gives the lengths of a sequence before the end.
      keep: Called with each cell and its number as soon as it is known.
    """
    phase = schedule.phase
    updates = schedule.config.spec.update_kv_cache
    cells = []
    first_token = num_tokens = num_ended = num_rows = num_written = extent = 0
    for index in range(phase.cells_per_step):
        # Behind the last sequence there is neither a length nor a page table.
        sequence = ints.minimum(cursor.sequence, end - 1)
        lengths = read_lengths(sequence)
        has_query = (cursor.sequence < end) & (lengths.q_len > 0)
        if index == 0:
            first_token = lengths.q_start
        cell = _describe_cell(
            schedule, sequence, cursor.num_before, lengths, has_query, first_token
        )
        keep(index, cell)
        cells.append(cell)
        is_last = schedule.cell_is_window or cell.visible_end <= phase.block_kv
        cursor = StepCursor(
            ints.where(is_last, cursor.sequence + 1, cursor.sequence),
            ints.where(is_last, 0, cursor.num_before + phase.block_kv),
        )
        # The sequences follow each other in the flat arrays.
        num_tokens = lengths.q_start + lengths.q_len - first_token
        num_ended = ints.where(is_last, num_tokens, lengths.q_start - first_token)
        num_rows += _num_rows(cell)
        extent = ints.maximum(extent, cell.visible_end)
        if updates:
            num_written += _num_new_rows(schedule, cell)
    step = Step(
        tuple(cells),
        first_token,
        num_tokens,
        num_ended,
        num_rows,
        num_written,
        extent,
    )
    return step, cursor


def _describe_cell(
    schedule: Schedule,
    sequence: Int,
    num_before: Int,
    lengths: Lengths,
    has_query: ints.Bool,
    first_token: Int,
) -> DecodeCell:
    """One cell of a step; without a query it sees nothing."""
    config, phase = schedule.config, schedule.phase
    spec, shift = config.spec, log2(config.cache.packing)
    kv_len = ints.where(has_query, lengths.kv_len, 0)
    num_queries = 1
    if phase.block_q > 1:
        num_queries = ints.minimum(lengths.q_len, spec.decode_q_len)
        num_queries = ints.where(has_query, num_queries, 0)
    place_in_causal_block = None
    if _has_causal_blocks(schedule):
        assert spec.causal_block is not None
        place_in_causal_block = (kv_len - num_queries) & (spec.causal_block - 1)
    start, row_begin, visible_begin = num_before, None, None
    if spec.hides_first_keys:
        num_seen = num_queries
        if spec.sliding_window is not None and spec.attend != "new":
            num_seen += spec.sliding_window - 1
        begin = kv_len - num_seen
        begin = ints.maximum(begin, 0)
        if schedule.cell_is_window:
            start = floor_to(begin, config.cache.packing)
        else:
            start += floor_to(begin, schedule.anchor_step)
            visible_begin = begin - start
            row_begin = ints.maximum(visible_begin, 0) >> shift
    if spec.needs_no_new_tokens:
        kv_len = ints.maximum(kv_len - num_queries, 0)
    visible_end = block_end = kv_len - start
    if not schedule.cell_is_window:
        block_end = ints.minimum(visible_end, phase.block_kv)
    new_place = None
    if spec.update_kv_cache:
        new_place = ints.maximum(visible_end - num_queries, 0)
        if phase.block_q == 1:
            is_new = schedule.cell_is_window or visible_end <= phase.block_kv
            new_place = visible_end - 1
        else:
            is_new = new_place < block_end
        new_place = ints.where(is_new, new_place, -1)
    return DecodeCell(
        place=_block_place(schedule, sequence, start),
        row_begin=row_begin,
        row_end=(block_end + (config.cache.packing - 1)) >> shift,
        visible_begin=visible_begin,
        visible_end=visible_end,
        new_place=new_place,
        query=ints.where(
            has_query, lengths.q_start - first_token, tokens_per_step(phase)
        ),
        num_before=None if schedule.cell_is_window else num_before,
        num_queries=None if phase.block_q == 1 else num_queries,
        place_in_causal_block=place_in_causal_block,
    )


def _block_place(schedule: Schedule, sequence: Int, start: Int) -> BlockPlace:
    """Where the block that starts at a position is among the pages."""
    config = schedule.config
    layout = config.cache
    index = sequence * config.pages_per_sequence + (start >> log2(layout.page_size))
    row = None
    if _starts_within_page(schedule):
        row = (start & (layout.page_size - 1)) >> log2(layout.packing)
    return BlockPlace(index, row)


def _has_causal_blocks(schedule: Schedule) -> bool:
    """Whether queries of a sequence see keys after them."""
    has_several = schedule.phase.block_q > 1
    return has_several and schedule.config.spec.causal_block is not None


def _starts_within_page(schedule: Schedule) -> bool:
    """Whether some blocks do."""
    return schedule.block_is_one_page_part or schedule.cell_is_window


def _num_rows(cell: DecodeCell) -> Int:
    return cell.row_end if cell.row_begin is None else cell.row_end - cell.row_begin


def _num_new_rows(schedule: Schedule, cell: DecodeCell) -> Int:
    """Rows of a cell that hold new tokens."""
    num_rows = 1
    if schedule.phase.block_q > 1:
        # The last row that is fetched has the last new token.
        num_rows = cell.row_end - (cell.new_place >> log2(schedule.packing))
    return ints.where(cell.new_place >= 0, num_rows, 0)


def new_end(phase: PhaseConfig, cell: DecodeCell) -> Int:
    """The token after the last new one of a block that has some."""
    return ints.minimum(cell.visible_end, phase.block_kv)


def tokens_per_step(phase: PhaseConfig) -> int:
    """Queries of a step at most: every cell has another sequence."""
    return phase.cells_per_step * phase.block_q

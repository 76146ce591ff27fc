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

All functions are arithmetic on scalars (ints.py), as in schedule.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jax_kernels.ragged_paged_attention.config import PhaseConfig
from jax_kernels.ragged_paged_attention.kernel import ints
from jax_kernels.ragged_paged_attention.kernel.ints import Int
from jax_kernels.ragged_paged_attention.kernel.schedule import (
    BlockPlace,
    Cell,
    Cursor,
    Lengths,
    Schedule,
)


class DecodeCell(NamedTuple):
    """One block of a sequence. Tokens and rows count from the start of the block."""

    place: BlockPlace
    row_begin: Int  # rows fetched
    row_end: Int
    visible_begin: Int  # tokens that some query sees; may be out of the block
    visible_end: Int
    new_place: Int  # where the first new token of the block goes, or -1
    query: Int  # number of its first query among those of the step
    out: Int  # number of its first output in the buffer; past the queries if none
    is_first: Int  # 1: the first block of its sequence
    num_queries: Int | None  # None: one, if it has an output


class Step(NamedTuple):
    """Cells that are fetched and computed together."""

    cells: tuple[DecodeCell, ...]
    first_token: Int  # of the first cell, in the flat query array
    num_tokens: Int  # queries, new keys and new values to fetch
    num_ended: Int  # queries of the sequences that end in the step
    num_rows: Int  # rows fetched
    num_written: Int  # rows written back


def step_structure(phase: PhaseConfig) -> Any:
    """How the numbers of a step are laid out: a tree of JAX."""
    cell = DecodeCell(BlockPlace(0, 0), *range(len(DecodeCell._fields) - 1))
    if phase.block_q == 1:
        cell = cell._replace(num_queries=None)
    return jax.tree.structure(Step((cell,) * phase.cells_per_step, 0, 0, 0, 0, 0))


def describe_step(
    schedule: Schedule,
    cursor: Cursor,
    end: Int,
    read_lengths: Callable[[Int], Lengths],
) -> tuple[Step, Cursor]:
    """The step that starts at a cursor, and the cursor of the next one.

    Args:
      schedule: Cell arithmetic.
      cursor: The first cell.
      end: The sequence after the last one. Cells there have no query and no rows.
      read_lengths: Gives the lengths of a sequence before the end.
    """
    cells, parts = [], []
    for _ in range(schedule.phase.cells_per_step):
        lengths = _lengths_or_none(cursor.sequence, end, read_lengths)
        cell = schedule.describe(cursor, lengths)
        first = cells[0] if cells else cell
        cells.append(cell)
        parts.append(
            _part_of_step(schedule, cell, cell.query_token - first.query_token)
        )
        cursor = schedule.advance(cell)
    first, last = cells[0], cells[-1]
    return (
        Step(
            cells=tuple(parts),
            first_token=first.query_token,
            num_tokens=last.query_token + last.num_queries - first.query_token,
            num_ended=sum(
                ints.where(cell.block + 1 >= cell.num_blocks, cell.num_queries, 0)
                for cell in cells
            ),
            num_rows=sum(part.row_end - part.row_begin for part in parts),
            num_written=sum(
                cell.write_row_end - cell.write_row_begin for cell in cells
            ),
        ),
        cursor,
    )


def _lengths_or_none(
    sequence: Int, end: Int, read_lengths: Callable[[Int], Lengths]
) -> Lengths:
    """The lengths of a sequence or, past the end, of one that is empty."""
    own = read_lengths(ints.minimum(sequence, end - 1))
    is_live = sequence < end
    return Lengths(
        q_start=own.q_start + ints.where(is_live, 0, own.q_len),
        q_len=ints.where(is_live, own.q_len, 0),
        kv_len=ints.where(is_live, own.kv_len, 0),
    )


def _part_of_step(schedule: Schedule, cell: Cell, query: Int) -> DecodeCell:
    phase, place = schedule.phase, schedule.block_place(cell)
    # Behind the last sequence there is no page table.
    table_index = ints.where(cell.num_queries > 0, place.table_index, 0)
    return DecodeCell(
        place=place._replace(table_index=table_index),
        row_begin=cell.cache_row_begin,
        row_end=cell.cache_row_end,
        visible_begin=cell.visible_begin - cell.block_start,
        visible_end=cell.visible_end - cell.block_start,
        new_place=ints.where(
            cell.write_row_end > cell.write_row_begin,
            cell.new_begin - cell.block_start,
            -1,
        ),
        query=query,
        out=ints.where(cell.num_queries > 0, query, tokens_per_step(phase)),
        is_first=ints.where(cell.block == 0, 1, 0),
        num_queries=None if phase.block_q == 1 else cell.num_queries,
    )


def new_end(phase: PhaseConfig, cell: DecodeCell) -> Int:
    """The token after the last new one of a block that has some."""
    return ints.minimum(cell.visible_end, phase.block_kv)


def tokens_per_step(phase: PhaseConfig) -> int:
    """Queries of a step at most: every cell has another sequence."""
    return phase.cells_per_step * phase.block_q

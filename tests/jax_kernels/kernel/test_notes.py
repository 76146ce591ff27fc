"""Notes in SMEM give back what was noted."""

import jax
import numpy as np
import pytest

from jax_kernels.ragged_paged_attention.kernel import notes
from jax_kernels.ragged_paged_attention.kernel.decode.steps import step_structure
from jax_kernels.ragged_paged_attention.kernel.refs import Bookkeeping, ScalarRefs
from jax_kernels.ragged_paged_attention.kernel.schedule import EMPTY_CELL, Lengths
from jax_kernels.ragged_paged_attention.kernel.tiles.buffers import CELL_STRUCTURE
from tests.jax_kernels.kernel.decode.test_steps import make_schedule


def test_cells_are_loaded_as_they_were_stored():
    memory = np.full(3 * len(EMPTY_CELL), -1, np.int32)
    cell = type(EMPTY_CELL)(*range(100, 100 + len(EMPTY_CELL)))
    notes.store(memory, 1, cell)
    assert notes.load(memory, 1, CELL_STRUCTURE) == cell
    assert (memory == -1).sum() == 2 * len(cell)


@pytest.mark.parametrize("window, decode_q_len", [(None, 1), (5, 4)])
def test_steps_are_loaded_as_they_were_stored(window, decode_q_len):
    schedule = make_schedule(window=window, decode_q_len=decode_q_len)
    structure = step_structure(schedule)
    size = structure.num_leaves
    memory = np.full(2 * size, -1, np.int32)
    step = jax.tree.unflatten(structure, range(size))
    notes.store(memory, 0, step)
    assert notes.load(memory, 0, structure) == step
    assert (memory[size:] == -1).all()


def test_nothing_is_being_written_at_first():
    bookkeeping = Bookkeeping(np.ones(4), np.ones(3), np.ones(2))
    notes.forget_writes(bookkeeping)
    assert not bookkeeping.written_rows.any() and not bookkeeping.out_tokens.any()


def test_lengths_of_a_sequence():
    scalars = ScalarRefs([7, 30], [], [0, 2, 12], [0, 0, 2])
    assert notes.read_lengths(scalars, 1) == Lengths(q_start=2, q_len=10, kv_len=30)

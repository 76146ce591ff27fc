"""Scalars that come from the vector unit, and operands of 8 bits in scalar memory."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.tpu_timing import SimulationError, isa, load_kernel, simulate
from benchmarks.tpu_timing.scalar_memory import packed_words
from jax_kernels import chips
from tests.benchmarks.recorded.guarded_loop.kernel import LOOPS, NAME

RECORDED = Path(__file__).parent / "recorded"
FLOAT_ONE = 0x3F800000


@pytest.fixture(scope="module")
def program():
    return load_kernel(RECORDED / NAME, NAME, chips.TPU7X)


def run(program, counts, **options):
    return simulate(program, chips.TPU7X, {0: counts}, **options)


def counts_of(last):
    """Two iterations of the first loop and some of the last, which is the 130th."""
    counts = np.zeros(LOOPS, np.int8)
    counts[0], counts[-1] = 2, last
    return counts


def iterations(result):
    """Of the innermost loop."""
    return max(loop.iterations for loop in result.loops if loop.depth == 2)


def test_a_value_of_the_vector_unit_is_not_guessed(program):
    with pytest.raises(SimulationError, match=r"spop.*give vector_results"):
        run(program, counts_of(1))


def test_the_value_that_is_given_decides_the_branch(program):
    not_raised = run(program, counts_of(4), vector_results=0)
    raised = run(program, counts_of(4), vector_results=FLOAT_ONE)
    assert raised.cycles > not_raised.cycles
    assert not_raised.warnings == [
        "6 values read back from the vector unit were assumed to be 0"
    ]


def test_no_value_is_needed_where_none_is_read(program):
    assert run(program, np.zeros(LOOPS, np.int8)).warnings == []


@pytest.mark.parametrize("last", [0, 7, 100])
def test_loop_counts_of_8_bits(program, last):
    assert iterations(run(program, counts_of(last), vector_results=0)) == 2 + last


def test_negative_counts_of_8_bits(program):
    assert iterations(run(program, counts_of(-128), vector_results=0)) == 2


def test_words_of_8_bits_hold_elements_128_apart():
    words = packed_words(np.array([-1] + [0] * 127 + [2] + [0] * 383 + [3]), 1)
    assert words[:2] == [0x2FF, 0]
    assert words[128] == 3
    assert len(words) == 256


def test_words_of_16_bits_hold_elements_128_apart():
    words = packed_words(np.array([5] + [0] * 127 + [-1]), 2)
    assert words[0] == 5 - 0x10000
    assert len(words) == 128


def test_packed_operands_have_one_dimension(program):
    with pytest.raises(SimulationError, match=r"one dimension, got shape \(2, 65\)"):
        run(program, np.zeros((2, 65), np.int8))


@pytest.mark.parametrize(
    ("relation", "expected"),
    [("gt", True), ("ge", True), ("lt", False), ("eq", False), ("ne", True)],
)
def test_floats_are_compared_as_floats(relation, expected):
    # As integers the bits of -1 are less than those of -2.
    minus_one, minus_two = isa.float32_bits(-1.0), isa.float32_bits(-2.0)
    assert isa.float32_comparison(relation, minus_one, minus_two) is expected

"""The instrument on small kernels of ours, as releases of libtpu wrote them.

Each folder in ``recorded`` has dumps, and in ``kernel.py`` what was compiled for TPU7x.
"""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.tpu_timing import find_stale_reads, load_kernel, simulate
from jax_kernels.chips import TPU7X

RECORDED = Path(__file__).parent / "recorded"


def run(folder, kernel, operands):
    """The program, its result and the iterations of its loops by their starts."""
    program = load_kernel(RECORDED / folder, kernel, TPU7X)
    assert program.warnings == []
    assert find_stale_reads(program) == []
    result = simulate(program, TPU7X, operands)
    assert result.nonzero_flags == {}
    assert result.warnings == []
    return program, result, {loop.start: loop.iterations for loop in result.loops}


@pytest.mark.parametrize("length", [0, 31, 64, 100, 64 * 32])
def test_floor_division_of_libtpu_0_0_44(length):
    """The kernel copies ``lens[0] // 32`` blocks, divided by an unsigned minimum."""
    lens = np.array([length] + [0] * 7)
    program, _, iterations = run("scalar_division", "floor_division", {0: lens})
    assert any("smin.u32" in bundle.text for bundle in program.bundles)
    assert iterations.get(0x21, 0) == length // 32


@pytest.mark.parametrize(("first", "second"), [(24, 902), (23, 2), (-1, 900)])
def test_remainders_of_libtpu_0_0_44(first, second):
    """It copies ``lens[0] % 12 + lens[1] % 900`` blocks: two divisions at a time."""
    lens = np.array([first, second] + [0] * 6)
    program, _, iterations = run("scalar_division", "remainders", {0: lens})
    assert any("sdivrem.u32" in bundle.text for bundle in program.bundles)
    assert iterations[0x29] == first % 12 + second % 900

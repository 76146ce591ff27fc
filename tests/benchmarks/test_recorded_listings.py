"""The instrument on small kernels of ours, as releases of libtpu wrote them.

Each folder in ``recorded`` has the files of one kernel. Its name says which, and which
libtpu compiled it for TPU7x.
"""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.tpu_timing import find_stale_reads, load_kernel, simulate
from jax_kernels.chips import TPU7X

RECORDED = Path(__file__).parent / "recorded"


@pytest.mark.parametrize("length", [0, 31, 64, 100, 64 * 32])
def test_floor_division_of_libtpu_0_0_44(length):
    """The kernel copies ``lens[0] // 32`` blocks, divided by an unsigned minimum."""
    program = load_kernel(
        RECORDED / "floor_division_libtpu_0_0_44", "floor_division", TPU7X
    )
    assert program.warnings == []
    assert find_stale_reads(program) == []
    assert any("smin.u32" in bundle.text for bundle in program.bundles)

    lens = np.array([length] + [0] * 7)
    result = simulate(program, TPU7X, {0: lens})
    iterations = {loop.start: loop.iterations for loop in result.loops}
    assert iterations.get(0x21, 0) == length // 32
    assert result.nonzero_flags == {}
    assert result.warnings == []

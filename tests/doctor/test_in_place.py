"""A cache that is copied is told from one that is not."""

import pytest

from torch_rpa.bridges.lowering import Target
from torch_rpa.doctor import in_place
from torch_rpa.doctor.in_place import MIB, Growth

TPU = Target("tpu", "v6e", "pallas")  # 1.64 TB/s: a copy of 1 GiB takes 1.3 ms
CPU = Target("cpu", None, "reference")


@pytest.mark.parametrize(
    ("added_seconds", "same_buffer", "target", "status", "is_copied"),
    [
        (20e-6, True, TPU, "ok", False),
        (-5e-6, None, TPU, "ok", False),
        (20e-6, False, TPU, "failed", False),
        (1.4e-3, True, TPU, "failed", True),
        (1.4e-3, None, TPU, "failed", True),
        (1.4e-3, None, TPU._replace(chip=None), "failed", True),
        (100e-3, True, CPU, "ok", True),
        (1e-3, True, CPU, "ok", False),
    ],
)
def test_what_a_larger_cache_costs(
    added_seconds, same_buffer, target, status, is_copied
):
    growth = Growth(100e-6, 100e-6 + added_seconds, 1024 * MIB, same_buffer)
    check = in_place.verdict(growth, target)
    assert check.status == status
    assert check.figures["is_copied"] == is_copied
    assert ("is copied" in check.finding) == is_copied

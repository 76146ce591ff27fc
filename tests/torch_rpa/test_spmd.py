"""Heads sharded over four devices: the tests of spmd_cases.py in their own process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch_xla")

import torch_xla.distributed.spmd as xs
import torch_xla.runtime

from torch_rpa import spmd

CASES = Path(__file__).with_name("spmd_cases.py")


@pytest.mark.slow
def test_heads_sharded_over_four_cpu_devices():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(CASES)]
    environment = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}
    result = subprocess.run(
        command,
        cwd=CASES.parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


def test_spmd_mode_must_be_on():
    assert not torch_xla.runtime.is_spmd()
    count = torch_xla.runtime.global_runtime_device_count()
    mesh = xs.Mesh(np.arange(count), (count,), ("model",))
    with pytest.raises(ValueError, match=r"use_spmd\(\) first"):
        spmd.empty_sharded_kv_cache(4, 8, 4, 128, mesh=mesh)

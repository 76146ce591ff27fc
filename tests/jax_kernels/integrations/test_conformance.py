"""tpu-inference's own tests of its kernels, from its wheel, run against the backend."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.support.child_results import ROOT

pytestmark = [pytest.mark.tpu_inference, pytest.mark.slow]

PLUGIN = "tests.jax_kernels.integrations.upstream_kernels"


def run_theirs(name, *, chosen="", **environment):
    """Runs the tests of a file whose names have a word; returns how many passed."""
    spec = importlib.util.find_spec("tpu_inference")
    assert spec is not None and spec.origin is not None
    packages = os.path.dirname(os.path.dirname(spec.origin))
    file = os.path.join(packages, f"tests/kernels/ragged_paged_attention_{name}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", PLUGIN, "-k", chosen, file]
    # None of this project's settings, and none of their fixtures for TPUs.
    command += ["--noconftest", "--import-mode=importlib", "-p", "no:cacheprovider"]
    child = subprocess.run(
        [*command, "-c", os.devnull, "--rootdir", packages],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-5000:]
    found = re.search(r"^(\d+) passed", child.stdout, re.MULTILINE)
    assert found is not None and "skipped" not in child.stdout
    return int(found[1])


@pytest.mark.extended
@pytest.mark.parametrize(
    ("name", "count"), [("kernel_v3_test", 67), ("kernel_v3_hd64_test", 45)]
)
def test_all_tests_of_their_kernels_pass_with_the_reference(name, count):
    assert run_theirs(name) == count


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("kernel_v3_test", "complex8"),
        ("kernel_v3_test", "quantized_kv_cache1"),
        ("kernel_v3_hd64_test", "basic1"),
    ],
)
def test_chosen_ones_pass_with_the_interpreted_kernel(name, chosen):
    assert run_theirs(name, chosen=chosen, RPA_INTERPRET="1") == 1

"""On a TPU: the doctor, the kernel's tests through JAX, a model, and timed steps.

Each runs in a child process, which holds the TPU while it lives. Elsewhere they are
skipped, and say so.
"""

import json
import subprocess
import sys

import pytest

from jax_kernels import machine
from tests.conftest import GIVEN_ENVIRONMENT, reason_without_tpu
from tests.test_readme import ROOT
from torch_rpa.bridges import BRIDGES

INSTALLED = [name for name, entry in BRIDGES.items() if entry.problem() is None]
# Of the kernel's tests, those that compare its numbers with float64.
KERNEL_TESTS = [
    f"tests/jax_kernels/test_kernel_{name}.py"
    for name in ("numerics", "edge_cases", "cache_writeback", "decode_q_len")
]


def run_on_tpu(*arguments, **variables) -> subprocess.CompletedProcess[str]:
    """Runs Python with the environment that the tests were started in."""
    environment = GIVEN_ENVIRONMENT | {"PJRT_DEVICE": "TPU"} | variables
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.tpu
@pytest.mark.parametrize("device", INSTALLED)
def test_the_doctor_finds_nothing_wrong(device, tmp_path):
    path = tmp_path / "report.json"
    arguments = ["--device", device, "--json", str(path)]
    done = run_on_tpu("-m", "torch_rpa.doctor", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    report = json.loads(path.read_text())
    assert report["device"]["implementation"] == "pallas"
    skipped = [c["name"] for c in report["checks"] if c["status"] == "skipped"]
    assert skipped == []


@pytest.mark.tpu
@pytest.mark.slow
def test_the_kernel_through_jax_is_within_its_budgets():
    arguments = ["-q", "-p", "no:xdist", "-m", "not slow and not extended"]
    done = run_on_tpu("-m", "pytest", *arguments, *KERNEL_TESTS, RPA_TEST_TPU="1")
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.mark.tpu
@pytest.mark.parametrize("device", INSTALLED)
def test_texts_are_those_of_eager_attention(device):
    pytest.importorskip("transformers")
    arguments = ["--device", device, "--check", "--page-size", "128"]
    done = run_on_tpu("-m", "torch_rpa.generate", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


@pytest.mark.tpu
@pytest.mark.torch_xla
def test_a_step_is_timed_through_both_libraries():
    arguments = ["--case", "llama-decode-8x1k", "--json", "-"]
    done = run_on_tpu("-m", "benchmarks.measure", *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout)["rows"]
    assert {row["library"] for row in rows} == {"torch", "jax"}


# ---- where there is none


def test_the_files_that_a_tpu_is_given_are_there():
    assert [path for path in KERNEL_TESTS if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize(
    ("variable", "is_worker", "has_device", "words"),
    [
        (None, False, False, "needs a TPU"),
        (None, True, True, "run pytest without -n"),
        ("0", False, True, "leaves the TPU alone"),
        ("1", False, True, "JAX holds the TPU"),
    ],
)
def test_why_tests_for_a_tpu_are_skipped(variable, is_worker, has_device, words):
    reason = reason_without_tpu(variable, is_worker=is_worker, has_device=has_device)
    assert reason is not None and words in reason


def test_tests_for_a_tpu_run_in_one_process_with_one():
    assert reason_without_tpu(None, is_worker=False, has_device=True) is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], False),
        (["vfio/vfio"], False),
        (["vfio/vfio", "vfio/0"], True),
        (["accel0"], True),
    ],
)
def test_a_tpu_is_found_by_its_device_file(files, expected, tmp_path):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert machine.has_tpu(tmp_path) == expected

"""The doctor on a TPU that compiles only: all runs, and numbers that are zeros fail."""

import json

import pytest

from tests.support import compile_only_tpu
from torch_rpa.doctor.checks import Status

REASON = compile_only_tpu.reason_to_skip()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.extended,
]


def test_every_check_is_made_and_zeros_are_not_right(tmp_path):
    path = tmp_path / "report.json"
    arguments = ["--device", "tpu", "--quick", "--json", str(path)]
    completed = compile_only_tpu.run(
        "v6e", tmp_path, "-m", "torch_rpa.doctor", *arguments, check=False
    )
    assert completed.returncode == 1, completed.stderr[-4000:]
    report = json.loads(path.read_text())
    assert report["complete"]
    assert report["device"]["chip"] == "v6e"
    assert report["device"]["implementation"] == "pallas"
    numbers = [c for c in report["checks"] if c["name"].startswith("numbers, ")]
    assert [c["status"] for c in numbers] == [Status.FAILED] * 9
    assert all("wrong_bytes" in c["figures"] for c in numbers)

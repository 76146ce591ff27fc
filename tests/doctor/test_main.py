"""The whole run, on CPU tensors and on the XLA CPU device."""

import json

import pytest
import torch

from torch_rpa.doctor import __main__ as doctor
from torch_rpa.doctor import batches, checks, in_place


def run(arguments, capsys, tmp_path):
    """Runs it; returns its exit status, its lines and its report."""
    path = tmp_path / "report.json"
    path.write_text("of another run")
    status = doctor.main([*arguments, "--json", str(path)])
    report = json.loads(path.read_text())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(report["checks"]) + 2
    assert report["complete"] and report["exit_status"] == status
    return status, lines, report


def test_cpu_tensors_are_compared_and_nothing_is_timed(capsys, tmp_path):
    status, lines, report = run(["--device", "cpu"], capsys, tmp_path)
    by_name = {check["name"]: check["status"] for check in report["checks"]}
    assert status == 0
    assert sum(name.startswith("numbers, ") for name in by_name) == 9
    skipped = [name for name, status in by_name.items() if status == "skipped"]
    assert {"kernel", in_place.NAME} < set(skipped)
    assert sum(name.startswith("speed, ") for name in skipped) == 4
    assert "skipped" in lines[-1]
    assert set(report["predictions"]["chips"]) == {"v5e", "v6e", "tpu7x"}


@pytest.mark.slow
@pytest.mark.torch_xla
def test_the_xla_cpu_device_is_compared_and_timed(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "SCALES", {torch.bfloat16: None})
    # As large as the small one: then one program serves all.
    page = batches.filled_cache(torch.bfloat16, batches.NUM_PAGES)[0]
    monkeypatch.setattr(in_place, "LARGE", {"cpu": batches.NUM_PAGES * page.nbytes})
    status, _, report = run(["--device", "xla"], capsys, tmp_path)
    assert status == 0
    assert report["device"]["implementation"] == "reference"
    (check,) = [c for c in report["checks"] if c["name"] == in_place.NAME]
    assert check["figures"]["same_buffer"] is True
    assert check["figures"]["large_seconds"] > 0


def test_quick_leaves_out_what_is_timed(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "KINDS", {})
    _, lines, _ = run(["--device", "cpu", "--quick"], capsys, tmp_path)
    assert sum("left out by --quick" in line for line in lines) == 5


def test_a_device_that_cannot_be_opened_ends_it(capsys, tmp_path, monkeypatch):
    def refuse(name):
        raise RuntimeError("The TPU is already in use by process with pid 5")

    monkeypatch.setattr(doctor.devices, "open_device", refuse)
    status, lines, report = run(["--device", "cpu"], capsys, tmp_path)
    assert status == 1
    assert "end the other one" in lines[-3]
    assert report["checks"][-1]["status"] == "failed"


def test_a_check_that_breaks_does_not_end_the_others(capsys, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("broken")

    monkeypatch.setattr(doctor.numbers, "check", fail)
    status, lines, _ = run(["--device", "cpu", "--quick"], capsys, tmp_path)
    assert status == 1
    assert sum("RuntimeError: broken" in line for line in lines) == 9
    assert checks.REPORT in lines[7]


def test_a_folder_that_is_not_there_is_named_before_anything_runs(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        doctor.main(["--json", str(tmp_path / "none" / "report.json")])
    assert exit_info.value.code == 2
    assert "--json: expected a file in a folder" in capsys.readouterr().err

"""The notebook of a first run, executed on the CPU, cell by cell."""

import json
import sys

import pytest

from tests.test_readme import ROOT
from torch_rpa.doctor.steps import STEPS

NOTEBOOK = ROOT / "docs" / "first_run_on_a_tpu.ipynb"
CONTENT = json.loads(NOTEBOOK.read_text("utf-8"))


def sources(kind: str) -> list[str]:
    cells = [cell for cell in CONTENT["cells"] if cell["cell_type"] == kind]
    return ["".join(cell["source"]) for cell in cells]


@pytest.mark.slow
def test_its_cells_run_on_the_cpu(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("TORCH_RPA_PYTHON", sys.executable)
    monkeypatch.setenv("TORCH_RPA_DOCTOR_OPTIONS", "--device cpu")
    monkeypatch.setattr(sys, "path", [*sys.path])
    names: dict = {}
    for cell in sources("code"):
        exec(compile(cell, str(NOTEBOOK), "exec"), names)
        names["REPORT"] = tmp_path / "doctor.json"  # not in the source tree
    printed = capsys.readouterr().out
    assert "ok       python: " in printed and "\nexit status 0\n" in printed
    for chip in ("v5e", "v6e"):
        for step in STEPS:
            assert f"{chip}, {step.words}: predicted " in printed
    assert (tmp_path / "doctor.png").stat().st_size > 1000


def test_it_says_that_it_has_not_run_on_a_tpu():
    assert "**It has not run on a TPU yet.**" in sources("markdown")[0]


def test_it_is_kept_without_outputs_and_names():
    assert CONTENT["nbformat"] == 4
    for cell in CONTENT["cells"]:
        assert cell.get("outputs", []) == [] and not cell.get("execution_count")

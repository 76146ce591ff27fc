"""Host cost: the steps, the report, and processes of two environments in turn."""

import json
import random
import sys

import pytest

from benchmarks import host, host_worker
from benchmarks.host import Subject
from tests.conftest import HAS_TPU

# Answers as a process that measures does, with the same times in every round.
STAND_IN = """#!{python}
import json, sys
described = ("chip", "commit", "jax", "torch", "{framework}")
print(json.dumps({{
    "framework": "{framework}",
    "environment": dict.fromkeys(described, "0"),
    "ways": ["operator", "jax_op alone"],
}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    cost = 3e-6 if request["way"] == "jax_op alone" else 1e-6
    times = [cost] * request["steps"]
    answer = {{"calls": times, "steps": times, "compilations": [1, 0]}}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def environments(tmp_path):
    """Paths of "interpreters" of environments with frameworks of known cost."""
    paths = []
    for framework in ("torch_xla", "torch_tpu"):
        path = tmp_path / framework
        path.write_text(STAND_IN.format(python=sys.executable, framework=framework))
        path.chmod(0o755)
        paths.append(str(path))
    return paths


def test_random_steps_fit_their_static_shape():
    generator = random.Random(1)
    seen = set()
    for _ in range(500):
        lengths = host_worker.random_lengths(generator)
        kv_lens, starts, distribution = host_worker.metadata_rows(lengths)
        assert len(kv_lens) == host_worker.NUM_SEQUENCES
        assert len(starts) == host_worker.NUM_SEQUENCES + 1
        assert starts == sorted(starts) and starts[-1] <= host_worker.MAX_TOKENS
        assert max(kv_lens) <= host_worker.PAGES * host_worker.PAGE_SIZE
        assert distribution[0] == distribution[1] <= distribution[2] == len(lengths)
        for index, (q_len, kv_len) in enumerate(lengths):
            assert 0 < q_len <= kv_len
            assert (q_len == 1) == (index < distribution[0])
        seen.add(tuple(lengths))
    assert len(seen) > 400


def test_each_framework_has_its_ways():
    for framework in host_worker.FRAMEWORKS:
        assert set(framework.ways) <= set(host_worker.WAYS)
    subjects = {
        Subject(f.package, way) for f in host_worker.FRAMEWORKS for way in f.ways
    }
    assert {subject for ratio in host.RATIOS for subject in ratio} <= subjects


def test_ratios_are_of_rounds_side_by_side():
    def answers(*medians):
        return [{"calls": [median / 2, median, 9 * median]} for median in medians]

    measured = {
        Subject("torch_tpu", "operator"): answers(2e-6, 40e-6, 6e-6),
        Subject("torch_xla", "operator"): answers(1e-6, 10e-6, 2e-6),
    }
    (ratio,) = host.ratios(measured)
    assert ratio["ratio"] == "torch_tpu operator / torch_xla operator"
    assert [ratio[key] for key in ("least", "median", "most")] == pytest.approx(
        [2, 3, 4]
    )


def test_all_rounds_of_a_way_are_one_row():
    answers = [
        {"calls": [1e-6], "steps": [8e-6], "compilations": [2, 1]},
        {"calls": [3e-6], "steps": [9e-6], "compilations": [0, 4]},
    ]
    row = host.row(Subject("torch_tpu", "operator"), answers)
    assert row["steps"] == 2 and row["compilations"] == [2, 5]
    assert row["call"]["median_us"] == pytest.approx(2)
    assert row["call"]["least_us"] == pytest.approx(1)


def test_an_environment_that_cannot_measure_says_why(tmp_path, capsys, monkeypatch):
    missing = str(tmp_path / "python")
    monkeypatch.setattr(sys, "executable", missing)
    assert host.main(["--steps", "1"]) == 2
    assert capsys.readouterr().err == f"{missing}: No such file or directory\n"


def test_an_environment_without_a_framework_is_refused(monkeypatch):
    monkeypatch.setattr(host_worker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(host_worker.NoDevice, match="neither torch_xla nor torch_tpu"):
        host_worker.open_device(None)


def test_two_environments_are_one_report(environments, tmp_path, capsys, monkeypatch):
    first, second = environments
    monkeypatch.setattr(sys, "executable", first)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{host.MARK}\nold\n{host.MARK}\nafter\n")
    arguments = ["--beside", second, "--steps", "4", "--rounds", "2"]
    assert host.main([*arguments, "--update", str(page)]) == 0
    assert capsys.readouterr().out.count("# chip 0") == 2
    lines = page.read_text().splitlines()
    assert "old" not in lines and (lines[0], lines[-1]) == ("before", "after")
    for name, ratio in (
        ("torch_tpu operator / torch_xla operator", "1.00 (1.00 to 1.00)"),
        ("torch_tpu jax_op alone / torch_tpu operator", "3.00 (3.00 to 3.00)"),
    ):
        assert f"| {name} | {ratio} |" in lines
    assert any("in 2 rounds. MEASURED." in line for line in lines)


def test_one_framework_twice_is_refused(environments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", environments[0])
    assert host.main(["--beside", environments[0]]) == 2
    assert "of two frameworks, got torch_xla" in capsys.readouterr().err


@pytest.mark.skipif(HAS_TPU, reason="measures the XLA CPU device")
@pytest.mark.torch_xla
@pytest.mark.slow
@pytest.mark.parametrize("way", ["operator", "compiled"])
def test_changing_lengths_compile_once(way, tmp_path, capsys):
    path = tmp_path / "host.json"
    arguments = ["--steps", "5", "--rounds", "2", "--layers", "2", "--way", way]
    assert host.main([*arguments, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# cost of a call on the host, MEASURED\n# chip ")
    assert printed.count(f"| torch_xla | {way} |") == 1
    content = json.loads(path.read_text())
    (described,) = content["environments"]
    assert {"commit", "jax", "torch_xla"} <= set(described)
    (row,) = content["rows"]
    assert row["compilations"] == [1, 0]
    assert 0 < row["call"]["median_us"] < row["whole_step"]["median_us"]

"""Serving benchmark: requests, padding, sums, and one small run of all systems."""

import dataclasses
import json

import pytest
import torch

from benchmarks.serving import __main__ as command
from benchmarks.serving import comparison, systems
from benchmarks.serving.jobs import (
    LONGEST_PROMPT,
    LONGEST_TEXT,
    MEAN_INTERVAL,
    SCENARIOS,
    SHARED_PREFIX,
    SHORTEST,
    Job,
    make_jobs,
    num_needed,
)
from benchmarks.serving.systems import Outcome
from tests.conftest import HAS_TPU

TEXT = bytes(range(32, 127)) * 10


def outcome(tokens, seconds=1.0, computed=10, compilations=0):
    latencies = [seconds] * len(tokens)
    return Outcome(tokens, seconds, latencies, computed, compilations)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_requests_are_mixed_and_the_same_every_time(scenario):
    jobs = make_jobs(scenario, 200, TEXT)
    assert jobs == make_jobs(scenario, 200, TEXT)
    assert jobs != make_jobs(scenario, 200, TEXT, seed=1)
    lengths = {len(job.prompt_ids) for job in jobs}
    assert max(lengths) <= LONGEST_PROMPT and len(lengths) > 20
    assert all(SHORTEST <= job.max_new_tokens <= LONGEST_TEXT for job in jobs)
    assert all(bytes(job.prompt_ids[-SHORTEST:]) in TEXT for job in jobs)


def test_only_arrivals_come_one_after_the_other():
    times = {
        name: [job.arrival for job in make_jobs(name, 400, TEXT)] for name in SCENARIOS
    }
    assert set(times["burst"]) == set(times["shared-prefix"]) == {0.0}
    arrivals = times["arrivals"]
    assert arrivals[0] == 0 and arrivals == sorted(set(arrivals))
    # The mean of 399 exponential intervals is within 5 sigma = 25 %.
    assert arrivals[-1] / 399 == pytest.approx(MEAN_INTERVAL, rel=0.25)


def test_only_shared_prefixes_are_shared():
    def beginnings(scenario):
        jobs = make_jobs(scenario, 50, TEXT)
        return {tuple(job.prompt_ids[:SHARED_PREFIX]) for job in jobs}

    assert len(beginnings("shared-prefix")) == 1
    assert len(beginnings("burst")) > 40


def test_the_last_token_of_a_text_needs_no_computation():
    assert num_needed([Job([1, 2, 3], 1), Job([1], 4)]) == 7


def test_padding_is_on_the_left_and_masked():
    ids, mask = systems.left_padded([[1, 2, 3], [4]])
    assert ids == [[1, 2, 3], [systems.PAD, systems.PAD, 4]]
    assert mask == [[1, 1, 1], [0, 0, 1]]


def test_positions_are_counted_until_the_end():
    model = torch.nn.Flatten()
    ids = torch.zeros(2, 5)
    with systems.counted_positions(model) as positions:
        model(ids)
        model(ids[:, :1])
        assert positions() == 12
    model(ids)
    assert positions() == 12


def test_rounds_are_summed_up_without_the_first():
    jobs = [Job([1, 2], 3)]
    rows = comparison.compare(
        jobs,
        {
            "engine": [outcome([[7, 8, 9]], seconds, 4) for seconds in (9, 1, 2, 3)],
            "padded": [
                outcome([[7, 8, 9]], seconds, 8, compilations)
                for seconds, compilations in ((9, 5), (3, 1), (3, 0), (3, 0))
            ],
        },
    )
    engine, padded = rows
    assert engine["tokens_per_second"] == 1.5 and engine["engine_ratio"] == 1
    assert padded["tokens_per_second"] == 1
    assert padded["engine_ratio"] == 1.5  # of 3, 1.5 and 1
    assert padded["engine_ratio_range"] == [1, 3]
    assert engine["padded_ratio"] == 1.5 and padded["padded_ratio"] == 1
    assert engine["padded_ratio_range"] == [1, 3]
    assert (engine["computed_per_needed"], padded["computed_per_needed"]) == (1, 2)
    assert padded["first_round_seconds"] == 9
    assert padded["first_round_compilations"] == 5 and padded["later_compilations"] == 1
    assert padded["median_latency_seconds"] == 3


@pytest.mark.parametrize(("system", "round_"), [("engine", 1), ("padded", 2)])
def test_other_tokens_in_any_round_are_an_error(system, round_):
    outcomes = {
        name: [outcome([[1, 2, 3]]) for _ in range(3)] for name in ("engine", "padded")
    }
    changed = dataclasses.replace(outcomes[system][round_], tokens=[[1, 5, 3]])
    outcomes[system][round_] = changed
    with pytest.raises(ValueError, match=f"{system} differs from padded: prompt 0, "):
        comparison.compare([Job([1], 3)], outcomes)


@pytest.mark.slow
@pytest.mark.skipif(HAS_TPU, reason="measures the CPU")
def test_all_systems_give_the_same_tokens(tmp_path, capsys):
    path = tmp_path / "serving.json"
    arguments = "--device cpu --scenario shared-prefix --requests 3 --rounds 1".split()
    threads = torch.get_num_threads()
    try:
        assert command.main([*arguments, "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    captured = capsys.readouterr()
    assert captured.out.startswith("# continuous batching, CPU scheduling figures, ")
    content = json.loads(path.read_text())
    assert {"commit", "transformers"} <= set(content["environment"])
    rows = {row["system"]: row for row in content["rows"]}
    assert set(rows) == {"engine", "padded", "paged", "transformers"}
    assert rows["padded"]["computed_per_needed"] > 1
    assert rows["engine"]["later_compilations"] == 0
    if reason := rows["transformers"].get("did_not_run"):  # an older release
        assert "ContinuousBatchingConfig" in reason and reason in captured.err
    else:
        assert rows["transformers"]["computed_per_needed"] < 1.01


def test_a_system_that_cannot_run_says_why(monkeypatch, tmp_path, capsys):
    def unavailable(model, jobs, device):
        raise systems.UnavailableError("no memory")

    def fixed(model, jobs, device):
        return outcome([[1] * job.max_new_tokens for job in jobs])

    replaced = {name: fixed for name in systems.SYSTEMS}
    replaced["transformers"] = unavailable
    monkeypatch.setattr(systems, "SYSTEMS", replaced)
    path, page = tmp_path / "serving.json", tmp_path / "page.md"
    page.write_text(f"before\n{command.MARK}\nold\n{command.MARK}\nafter\n")
    arguments = "--device cpu --scenario burst --requests 2 --rounds 1 --threads 2"
    threads = torch.get_num_threads()
    try:
        files = ["--json", str(path), "--update", str(page)]
        assert command.main([*arguments.split(), *files]) == 0
    finally:
        torch.set_num_threads(threads)
    updated = page.read_text()
    assert "| cpu | burst | padded | " in updated and "old" not in updated
    assert "\ntransformers did not run: no memory\n" in updated
    assert "transformers did not run: no memory\n" in capsys.readouterr().err
    rows = json.loads(path.read_text())["rows"]
    assert [row.get("did_not_run") for row in rows] == [None] * 3 + ["no memory"]


def test_scenarios_on_the_xla_device_run_in_processes_of_their_own(monkeypatch, capsys):
    calls = []

    def record(jobs, device, rounds, threads):
        calls.append((len(jobs), device, rounds, threads))
        return [], {}

    monkeypatch.setattr(comparison, "run_scenario_in_process", record)
    threads = torch.get_num_threads()
    arguments = "--device xla --scenario burst arrivals --xla-requests 3 --rounds 2"
    try:
        assert command.main([*arguments.split(), "--threads", "2"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert calls == [(3, "xla", 2, 2)] * 2


@pytest.mark.slow
def test_a_process_gives_what_the_scenario_gives():
    jobs = [Job([1, 2, 3], 2), Job([4], 3)]
    here, _ = comparison.run_scenario(jobs, "cpu", 1)
    rows, reasons = comparison.run_scenario_in_process(jobs, "cpu", 1, 1)
    names = ("system", "computed_per_needed", "later_compilations")
    assert [[row[name] for name in names] for row in rows] == [
        [row[name] for name in names] for row in here
    ]
    assert {"engine", "padded"} <= {row["system"] for row in rows} | {*reasons}


@pytest.mark.parametrize("option", ["--rounds", "--requests", "--max-new-tokens"])
def test_impossible_sizes_are_refused(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main([option, "0"])
    assert f"{option}: expected " in capsys.readouterr().err

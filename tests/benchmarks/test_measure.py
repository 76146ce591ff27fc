"""Timing, the rows of the result, and what happens without a TPU."""

import json
import subprocess
import sys

import pytest

from benchmarks import cases, environment, measure, measurement, timing
from jax_kernels import machine
from tests.conftest import HAS_TPU

TINY = cases.fitted(
    "tiny",
    cases.Model(4, 2, 128, with_sinks=True),
    "1/20,3/9",
    page_size=8,
    num_sequences=3,
)
ONCE = measurement.Repetition(warm_up=1, repeats=2, calls=2)


@pytest.mark.skipif(machine.has_tpu(), reason="there is a TPU")
def test_without_a_tpu_it_says_so_and_exits_with_2():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measure", "--table"],
        cwd=environment.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no TPU" in done.stderr
    assert done.stdout == ""


def test_time_is_per_call_and_without_warm_up():
    ticks = iter([10.0, 14.0, 20.0, 26.0])
    runs = []
    timed = timing.time_runs(
        runs.append,
        lambda: None,
        warm_up=3,
        repeats=2,
        calls=2,
        clock=lambda: next(ticks),
    )
    assert runs == [2] * 5
    assert timed.median == (4 / 2 + 6 / 2) / 2
    assert timed.num_samples == 2


def test_median_and_deciles():
    timed = timing.summarize([float(n) for n in range(101)])
    assert (timed.low, timed.median, timed.high) == (10, 50, 90)
    assert timing.summarize([3.0]) == timing.Timing(3.0, 3.0, 3.0, 1)


def test_a_row_has_shares_and_the_ratio_to_its_prediction(tmp_path):
    path = tmp_path / "predicted.json"
    listed = [{"case": "tiny", "chip": "v6e", "microseconds": 50.0}]
    path.write_text(json.dumps({"kind": "prediction", "cases": listed}))
    predicted = measure.read_predictions(str(path))
    timed = timing.summarize([100e-6])
    line = measure.row(TINY, "jax", "TPU v6 lite", timed, predicted)
    assert line["ratio_to_prediction"] == pytest.approx(2)
    assert line["chip"] == "v6e"
    assert 0 < line["mbu"] < 1
    assert line["kind"] == "measurement"


def test_measurements_are_not_taken_for_predictions(tmp_path):
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"kind": "measurement", "rows": []}))
    with pytest.raises(ValueError, match=r"expected the JSON of benchmarks\.predict"):
        measure.read_predictions(str(path))


@pytest.mark.slow
@pytest.mark.skipif(HAS_TPU, reason="JAX computes on the TPU, not on the CPU")
def test_both_libraries_run_a_case_on_the_cpu():
    """The same calls as on a TPU; there the kernel takes the reference's place."""
    pytest.importorskip("torch_xla")
    from jax_kernels.ragged_paged_attention import ragged_paged_attention_reference

    _, with_torch = measurement.time_with_torch(TINY, ONCE)
    reference = ragged_paged_attention_reference
    _, with_jax = measurement.time_with_jax(TINY, ONCE, attention=reference)
    for timed in (with_torch, with_jax):
        assert timed.median > 0
        assert timed.num_samples == 2


@pytest.mark.parametrize(
    ("flags", "clock", "microseconds"),
    [
        ("", "default", 12.0),
        ("--xla_tpu_dvfs_p_state=3", "default", 12.0),
        ("--other --xla_tpu_dvfs_p_state=7", "highest", 10.0),
    ],
)
def test_a_measurement_is_compared_with_the_prediction_for_its_clock(
    monkeypatch, tmp_path, flags, clock, microseconds
):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", flags)
    assert measure.clock() == clock
    case = {"case": "a", "chip": "tpu7x", "microseconds": 10.0}
    one_clock = {**case, "chip": "v6e", "default_clock_microseconds": None}
    two_clocks = {**case, "default_clock_microseconds": 12.0}
    path = tmp_path / "predicted.json"
    path.write_text(
        json.dumps({"kind": "prediction", "cases": [one_clock, two_clocks]})
    )
    expected = {("a", "tpu7x"): microseconds, ("a", "v6e"): 10.0}
    assert measure.read_predictions(str(path)) == expected

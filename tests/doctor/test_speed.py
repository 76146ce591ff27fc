"""Steps are cases of the benchmarks; their predictions are of the present kernel."""

import dataclasses
import json

import pytest
import torch

from benchmarks import accuracy, cases
from jax_kernels import chips
from tests.test_readme import ROOT
from torch_rpa.doctor import speed, steps, timing
from torch_rpa.doctor.checks import Status
from torch_rpa.doctor.steps import STEPS, Prediction

PREDICTED = steps.read_predictions()["chips"]
BY_NAME = pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
# How far shipped predictions may be from those of the present kernel. Expected
# measured times are further away.
MARGIN = 0.05


@BY_NAME
def test_a_step_is_the_case_of_its_name(step):
    case = cases.BY_NAME[step.name]
    model, shape = case.shape.model, case.shape
    given = step.num_heads, step.num_kv_heads, step.head_dim
    assert given == (model.num_q_heads, model.num_kv_heads, model.head_dim)
    for name in ("num_tokens", "num_sequences", "pages_per_sequence", "page_size"):
        assert getattr(step, name) == getattr(shape, name)
    assert step.cache_dtype == shape.cache_dtype
    others = {"sm_scale": step.head_dim**-0.5, "causal": True, "decode_q_len": 1}
    others |= {"attend": "all", "update_kv_cache": True, "return_lse": False}
    others |= {"batch_invariant": False}
    assert {k: v for k, v in shape.options.items() if v is not None} == others
    assert step.sequences == [(s.q_len, s.kv_len) for s in case.sequences]
    assert step.needed_bytes == case.ideal.bytes
    assert step.needed_flops == case.ideal.flops


def test_every_chip_that_is_compiled_for_has_predictions_of_every_step():
    assert set(PREDICTED) == set(chips.COMPILED)
    for chip, record in PREDICTED.items():
        assert set(record["cases"]) == {step.name for step in STEPS}
        for name, case in record["cases"].items():
            bound = next(s for s in STEPS if s.name == name).bound_microseconds(
                chips.COMPILED[chip]
            )
            assert bound < case["microseconds"] < 2 * bound


@BY_NAME
def test_predictions_are_those_of_the_regression_test(step):
    baseline = json.loads((ROOT / "tests/benchmarks/predicted_cycles.json").read_text())
    rates = chips.COMPILED[baseline["chip"]].rates
    expected = 1e6 * rates.seconds(baseline["cycles"][step.name])
    shipped = PREDICTED[baseline["chip"]]["cases"][step.name]["microseconds"]
    names = " ".join(s.name for s in STEPS)
    assert shipped == pytest.approx(expected, rel=MARGIN), (
        f"the kernel is no longer as fast: for each chip of {', '.join(PREDICTED)} run "
        f"python -m benchmarks.predict --chip CHIP --case {names} "
        "--doctor torch_rpa/doctor/predictions.json"
    )


def test_the_expected_range_is_that_of_the_calibration():
    for chip, record in PREDICTED.items():
        of_all = {
            (r.low, r.high)
            for kind in {c.kind for c in accuracy.read()}
            for r in [accuracy.expected(kind, chip)]
        }
        assert {tuple(c["expected"]) for c in record["cases"].values()} <= of_all


def test_the_prediction_is_that_of_the_clock():
    step = STEPS[2]
    highest = steps.prediction(step, "tpu7x", "highest")
    default = steps.prediction(step, "tpu7x", "default")
    assert highest is not None and default is not None
    assert default.microseconds > 1.15 * highest.microseconds
    for chip in ("v4", None):
        assert steps.prediction(step, chip, "highest") is None
    one_clock = [steps.prediction(step, "v6e", clock) for clock in chips.CLOCKS]
    assert one_clock[0] == one_clock[1]


# ---- verdicts


@pytest.mark.parametrize(
    ("ratio", "status"),
    [(1.0, "ok"), (1.3, "ok"), (1.5, "warning"), (0.9, "failed")],
)
def test_a_time_is_compared_with_its_prediction(ratio, status):
    step = STEPS[0]
    prediction = Prediction(step.bound_microseconds(chips.V6E) * 1.05, 0.95, 1.11)
    seconds = 1e-6 * ratio * prediction.microseconds
    check = speed.verdict(step, seconds, "v6e", prediction)
    assert check.status == status
    assert "TB/s" in check.finding and "measured" in check.finding
    if status == "failed":  # shorter than the peaks of the chip allow
        assert "not waited for" in check.finding
    else:
        assert check.figures["ratio_to_prediction"] == pytest.approx(ratio)


def test_without_a_prediction_it_says_so():
    check = speed.verdict(STEPS[2], 1e-3, "v4", None)
    assert check.status is Status.OK
    assert "TFLOP/s" in check.finding and "no prediction" in check.finding
    assert check.figures["predicted_microseconds"] is None
    assert "bound_microseconds" not in check.figures


# ---- measuring


def test_the_median_is_without_warm_up():
    ticks = iter([0.0, 4.0, 10.0, 11.0, 20.0, 22.0])
    runs = []
    seconds = timing.median_seconds(
        lambda: runs.append(1), lambda: None, repeats=3, clock=lambda: next(ticks)
    )
    assert (seconds, len(runs)) == (2.0, 5)


def test_the_tensors_of_a_step_are_valid():
    step = dataclasses.replace(
        STEPS[3],
        lengths=((3, 1, 20), (1, 4, 130)),
        num_tokens=9,
        num_sequences=6,
        pages_per_sequence=2,
        num_heads=4,
        num_kv_heads=2,
    )
    inputs = speed.make(step, torch.device("cpu"))
    assert inputs.kv_cache.shape[0] == step.num_pages == 5
    assert inputs.distribution.tolist() == [3, 3, 4]
    assert speed.measure(step, torch.device("cpu"), calls=1, repeats=1) > 0

"""The kernel does not get slower: predicted cycles of the two main cases.

Compiles with libtpu and compares with ``predicted_cycles.json``.
"""

import json
from pathlib import Path

import pytest

from benchmarks import cases, environment
from benchmarks import prediction as prediction_lib
from jax_kernels import chips
from tests.conftest import HAS_TPU

pytest.importorskip("libtpu", reason="needs libtpu, which compiles without a TPU")

BASELINE_PATH = Path(__file__).with_name("predicted_cycles.json")
BASELINE = json.loads(BASELINE_PATH.read_text())
MARGIN = 0.05
UPDATE = (
    f"python -m benchmarks.predict --chip {BASELINE['chip']} "
    f"--case {' '.join(BASELINE['cycles'])} "
    f"--baseline tests/benchmarks/{BASELINE_PATH.name}"
)


def verdict(name: str, cycles: float, expected: int) -> str | None:
    """None, or why the cycles of a case are too many and what to do about it."""
    if cycles <= expected * (1 + MARGIN):
        return None
    return (
        f"{name}: {cycles:.0f} predicted cycles, {cycles / expected - 1:.1%} more than "
        f"the baseline of {expected}. If this is meant, update it: {UPDATE}"
    )


def test_the_margin_is_kept_and_a_failure_says_how_to_update():
    assert verdict("case", 1050, 1000) is None
    assert verdict("case", 900, 1000) is None
    message = verdict("case", 1051, 1000)
    assert message is not None
    assert "5.1% more" in message
    assert "--baseline tests/benchmarks/predicted_cycles.json" in message


@pytest.mark.slow
@pytest.mark.skipif(HAS_TPU, reason="libtpu may be held by the TPU's own process")
@pytest.mark.parametrize("name", BASELINE["cycles"])
def test_no_case_is_predicted_slower_than_its_baseline(name):
    described = environment.describe(BASELINE["chip"])
    for package in ("jax", "libtpu"):
        if described[package] != BASELINE[package]:
            pytest.skip(
                f"the baseline is of {package} {BASELINE[package]}, here is "
                f"{described[package]}: {UPDATE}"
            )
    chip = chips.COMPILED[BASELINE["chip"]]
    (prediction,) = prediction_lib.predict_all(cases.select([name]), chip)
    assert prediction.result.nonzero_flags == {}
    problem = verdict(name, prediction.result.cycles, BASELINE["cycles"][name])
    assert problem is None, problem

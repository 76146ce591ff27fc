"""The kernel does not get slower: predicted cycles of the tables.

Compiles with libtpu and compares with ``predicted_cycles.json``, which has all cases of
the main table and of deployments. A few programs are compiled in every run, the others
in an extended one. Their loops are measured as well, see tests/support/code_size.py,
and XLA must not put anything around the kernel.
"""

import json
from pathlib import Path

import pytest

from benchmarks import cases, compiler, environment, prediction
from benchmarks.tpu_timing import code_size
from jax_kernels import chips
from tests.conftest import HAS_TPU
from tests.support.code_size import LARGEST_LOOP

pytest.importorskip("libtpu", reason="needs libtpu, which compiles without a TPU")

BASELINE_PATH = Path(__file__).with_name("predicted_cycles.json")
BASELINE = json.loads(BASELINE_PATH.read_text())
TABLES = ("main", "deployments")
MARGIN = 0.01
UPDATE = (
    f"python -m benchmarks.predict --chip {BASELINE['chip']} --table "
    f"{' '.join(TABLES)} --baseline tests/benchmarks/{BASELINE_PATH.name}"
)

GUARDED = {case.name: case for name in TABLES for case in cases.TABLES[name]}
PROGRAMS = cases.by_shape(
    case for case in GUARDED.values() if case.name in BASELINE["cycles"]
)
# A case of each program that every run compiles: decode and prefill of the main table,
# and decode of shards.
ALWAYS = {
    "llama-decode-128x1k",
    "llama-prefill-2k-at-8k",
    "deploy-8x1-dec256",
    "deploy-gpt-oss-8x1-w128-dec256",
}


def verdict(name: str, cycles: float, expected: int) -> str | None:
    """None, or why the cycles of a case are too many and what to do about it."""
    if cycles <= expected * (1 + MARGIN):
        return None
    return (
        f"{name}: {cycles:.0f} predicted cycles, {cycles / expected - 1:.1%} more than "
        f"the baseline of {expected}. If this is meant, update it: {UPDATE}"
    )


def test_the_margin_is_kept_and_a_failure_says_how_to_update():
    assert verdict("case", 1010, 1000) is None
    assert verdict("case", 900, 1000) is None
    message = verdict("case", 1011, 1000)
    assert message is not None
    assert "1.1% more" in message
    assert "--baseline tests/benchmarks/predicted_cycles.json" in message


def test_the_record_has_no_other_cases():
    assert set(BASELINE["cycles"]) <= set(GUARDED)
    assert set(GUARDED) >= ALWAYS


@pytest.mark.extended
def test_the_record_has_all_cases():
    assert set(BASELINE["cycles"]) == set(GUARDED), UPDATE


def _programs() -> list:
    return [
        pytest.param(
            members,
            id=members[0].name,
            marks=()
            if any(case.name in ALWAYS for case in members)
            else pytest.mark.extended,
        )
        for members in PROGRAMS.values()
    ]


@pytest.mark.slow
@pytest.mark.skipif(HAS_TPU, reason="libtpu may be held by the TPU's own process")
@pytest.mark.parametrize("members", _programs())
def test_no_case_is_predicted_slower_than_its_baseline(members):
    described = environment.describe(BASELINE["chip"])
    for package in ("jax", "libtpu"):
        if described[package] != BASELINE[package]:
            pytest.skip(
                f"the baseline is of {package} {BASELINE[package]}, here is "
                f"{described[package]}: {UPDATE}"
            )
    chip = chips.COMPILED[BASELINE["chip"]]
    program = compiler.compile_program(members[0].shape, chip.name)
    # Wider heads need reshapes.
    assert program.bytes_around == 0 or members[0].shape.model.head_dim > 128
    loops = code_size.loop_sizes(program)
    assert loops and loops[0].bundles <= LARGEST_LOOP, str(loops[0])
    problems = []
    for case in members:
        result = prediction.predict(case, chip, program).result
        assert result.nonzero_flags == {}
        problems.append(
            verdict(case.name, result.cycles, BASELINE["cycles"][case.name])
        )
    assert not any(problems), "\n".join(filter(None, problems))

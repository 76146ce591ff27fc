"""What the sweep calls a violation, on invented times, and its command line."""

import dataclasses
import re
from typing import Any

import pytest

from benchmarks import cases, compiler, prediction, sweep, sweep_checks
from benchmarks.tpu_timing import load_kernel
from jax_kernels import chips
from tests.benchmarks import synthetic_dump

CHIP = chips.TPU7X
BASE = cases.fitted("base", cases.LLAMA3_8B, "128*1/1024")


def record(us=1.0, code_us=0.0, spills=0):
    return {"microseconds": us, "code_microseconds": code_us, "spills": spills}


def point(
    lengths="128*1/1024",
    us=100.0,
    code_us=0.0,
    spills=0,
    window=None,
    model=cases.LLAMA3_8B,
    **static,
):
    model = dataclasses.replace(model, sliding_window=window)
    case = cases.fitted(f"{static} {lengths}", model, lengths, **static)
    return sweep_checks.as_point(case, CHIP, record(us, code_us, spills))


def test_efficiency_is_the_bound_by_the_time():
    decode = point(us=1000)
    bytes_us = 1e6 * BASE.ideal.bytes / CHIP.rates.hbm_bytes_per_s / 0.92
    assert decode.efficiency == pytest.approx(bytes_us / 1000)
    # Prefill at D = 128 reaches half of the peak of a matrix unit of 256 at most.
    prefill = point("1*2048/8192", us=1000)
    case = cases.fitted("x", cases.LLAMA3_8B, "2048/8192")
    flops_us = 1e6 * case.ideal.flops / CHIP.rates.bf16_flops_per_s
    assert prefill.efficiency == pytest.approx(2 * flops_us / 1000)


@pytest.mark.parametrize(
    "near, far",
    [
        (("64*1/1024", {}), ("128*1/1024", {})),  # sequences
        (("128*1/512", {}), ("128*1/1024", {})),  # context
        (("1*256/256", {}), ("1*512/512", {})),  # new tokens
        (("128*1/1024", {"page_size": 64}), ("128*1/1024", {})),
        (("128*1/8192", {"window": 512}), ("128*1/8192", {"window": 1024})),
    ],
)
@pytest.mark.parametrize("is_near_slow", [True, False])
def test_less_than_half_the_efficiency_of_a_neighbour_is_a_cliff(
    near, far, is_near_slow
):
    def timed(step, efficiency):
        lengths, static = step
        one = point(lengths, us=1, **static)
        return point(lengths, us=one.efficiency / efficiency, **static)

    good, bad = timed(near, 0.8), timed(far, 0.8)
    assert not list(sweep_checks.cliffs([good, bad]))
    good, bad = (near, far)[is_near_slow], (far, near)[is_near_slow]
    (found,) = sweep_checks.cliffs([timed(good, 0.8), timed(bad, 0.39)])
    assert "39.0% efficiency" in found
    assert not list(sweep_checks.cliffs([timed(good, 0.8), timed(bad, 0.41)]))


def test_shapes_far_apart_are_no_neighbours():
    small, large = point("4*1/1024", us=100), point("16*1/1024", us=100)
    assert small.efficiency < 0.5 * large.efficiency
    assert not list(sweep_checks.cliffs([small, large]))


def test_models_are_compared_in_large_steps():
    def step(model, efficiency, lengths="128*1/8192"):
        case = cases.fitted(f"{model} {lengths}", model, lengths)
        one = sweep_checks.as_point(case, CHIP, record())
        return sweep_checks.as_point(case, CHIP, record(one.efficiency / efficiency))

    llama, mqa = cases.LLAMA3_8B, cases.MQA
    assert not list(sweep_checks.models_behind([step(llama, 0.9), step(mqa, 0.5)]))
    (found,) = sweep_checks.models_behind([step(llama, 0.9), step(mqa, 0.2)])
    assert "20.0% efficiency" in found
    small = [step(llama, 0.9, "4*1/512"), step(mqa, 0.1, "4*1/512")]
    assert not list(sweep_checks.models_behind(small))


def test_a_window_must_not_cost_more_with_the_context():
    def steps(us):
        near = point("128*1/1024", us=100, window=128)
        return [near, point("128*1/8192", us=us, window=128)]

    assert not list(sweep_checks.window_costs(steps(109)))
    (found,) = sweep_checks.window_costs(steps(111))
    assert "takes 111.0 us" in found
    # One token more, and the window reaches into another page, which takes 20 us.
    odd = point("128*1/1025", us=125, window=128)
    assert not list(sweep_checks.window_costs([odd, *steps(100)]))
    odd = point("128*1/1025", us=133, window=128)
    (found,) = sweep_checks.window_costs([odd, *steps(100)])
    assert "takes 133.0 us" in found
    # A context shorter than two windows may be cheaper.
    inside = point("128*1/128", us=50, window=128)
    assert not list(sweep_checks.window_costs([inside, *steps(100)]))


def test_a_window_must_not_cost_more_by_where_in_a_page_it_begins():
    """A second cell for each sequence, where memory would have time for it."""

    def step(lengths, us):
        return point(lengths, us=us, window=128, model=cases.GPT_OSS)

    even = step("128*1/1024", 40.5)
    assert not list(sweep_checks.window_costs([even, step("128*1/1000", 43.0)]))
    (found,) = sweep_checks.window_costs([even, step("128*1/1000", 76.4)])
    assert "takes 76.4 us" in found


def test_a_window_costs_what_a_context_of_its_length_does():
    full = [point("128*1/256", us=40), point("128*1/512", us=80)]
    assert not list(
        sweep_checks.window_costs([*full, point("128*1/8192", 49, window=128)])
    )
    (found,) = sweep_checks.window_costs([*full, point("128*1/8192", 51, window=128)])
    assert "a context of 256 without a window 40" in found


def test_float8_must_not_be_slower():
    fp8: dict[str, Any] = {"cache_dtype": "float8_e4m3fn"}
    assert not list(
        sweep_checks.slower_with_fp8([point(us=100), point(us=100.5, **fp8)])
    )
    (found,) = sweep_checks.slower_with_fp8([point(us=100), point(us=102, **fp8)])
    assert "takes 102.0 us" in found
    # A short step may wait for a larger part of the program, no more.
    assert not list(
        sweep_checks.slower_with_fp8([point(us=8), point(us=8.8, code_us=0.9, **fp8)])
    )
    waiting = point(us=9.2, code_us=3, **fp8)
    assert list(sweep_checks.slower_with_fp8([point(us=8), waiting]))
    other = point("64*1/1024", us=300, **fp8)
    assert not list(sweep_checks.slower_with_fp8([point(us=100), other]))


def test_an_empty_phase_costs_little():
    more: dict[str, Any] = {"chunk_prefill_size": 256}
    assert not list(
        sweep_checks.empty_phase_costs([point(us=9), point(us=11.9, **more)])
    )
    (found,) = sweep_checks.empty_phase_costs([point(us=9), point(us=12.4, **more)])
    assert "3.40 us more" in found


def test_a_loop_that_fetches_its_instructions_is_found():
    once, often = (dataclasses.replace(point(), code_microseconds=n) for n in (6, 60))
    assert not list(sweep_checks.code_waits([once]))
    (found,) = sweep_checks.code_waits([once, often])
    assert "waits 60.0 us" in found


def test_fetches_of_instructions_are_in_the_time(toy_compiler):
    (case,) = (case for case in cases.SWEEP if case.name == "llama:8*1/1024")
    program = compiler.compile_program(case.shape, CHIP.name)
    kept = sweep.predict_case(case, CHIP, program)
    result = prediction.predict(case, CHIP, program).result
    assert kept["code_microseconds"] > 1
    assert kept["microseconds"] == result.microseconds
    found = sweep_checks.as_point(case, CHIP, kept)
    assert found.work_microseconds < found.microseconds


def test_spills_are_counted():
    assert not list(sweep_checks.spills([point()]))
    (found,) = sweep_checks.spills([point(spills=3)])
    assert "3 times" in found


def test_the_table_covers_what_is_promised():
    shapes = {case.shape for case in cases.SWEEP}
    counts = {len(case.sequences) for case in cases.SWEEP}
    assert {shape.page_size for shape in shapes} == {16, 32, 64, 128, 256}
    assert counts >= {4, 8, 16, 32, 64, 128, 256, 512, 1024}
    models = {dataclasses.replace(s.model, sliding_window=None) for s in shapes}
    named = {m for n, m in cases.MODEL_NAMES.items() if n != "wide"}
    assert models >= {dataclasses.replace(m, sliding_window=None) for m in named}
    assert set(cases.SWEEP) >= set(cases.DEPLOYMENTS)
    odd = {case.name for case in cases.SWEEP if case.sequences[0].kv_len % 8}
    assert {"llama:8*1/257", "llama-window128:128*1/8100"} <= odd
    for model in named:
        assert {s.cache_dtype for s in shapes if s.model == model} == {
            "bfloat16",
            "float8_e4m3fn",
        }
    for case in cases.SWEEP:
        sweep_checks.as_point(case, CHIP, record())


@pytest.fixture
def toy_compiler(tmp_path, monkeypatch):
    """The toy kernel loops kv_lens[0] times, whatever the batch is."""
    program = load_kernel(synthetic_dump.write(tmp_path), "toy")
    compiled = []

    def compile_program(shape, chip):
        compiled.append(shape)
        return program

    monkeypatch.setattr(compiler, "compile_program", compile_program)
    return compiled


def test_a_violation_is_exit_code_1_and_a_journal_continues(
    toy_compiler, tmp_path, capsys
):
    path = tmp_path / "sweep.jsonl"
    arguments = ["--only", "llama-window128:8[*]1/*", "--journal", str(path)]
    assert sweep.main(arguments) == 1
    out = capsys.readouterr().out
    assert out.startswith("# ")
    assert "PREDICTED" in out
    assert re.search(r"in proportion to the window: [1-9]\d* violations", out)
    assert "float8 is never slower: no violations" in out
    assert len(toy_compiler) == 1
    assert sweep.main(arguments) == 1
    assert len(toy_compiler) == 1
    assert capsys.readouterr().out == out


def test_no_violation_is_exit_code_0(toy_compiler):
    assert sweep.main(["--only", "llama:8*1/1024"]) == 0


def test_a_pattern_must_match(toy_compiler, capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--only", "nothing"])
    assert "expected the name of a case, got ['nothing']" in capsys.readouterr().err

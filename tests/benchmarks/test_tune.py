"""The tuner, on invented costs in place of the compiler."""

import math
import subprocess
import sys

import pytest

from benchmarks import cases, environment, journal, measurement, timing, tune
from benchmarks.tuning import search, trials
from jax_kernels import chips, machine, tuned
from jax_kernels.ragged_paged_attention.config import BlockSizes

DEFAULT = BlockSizes(1024, 256, 512)
LLAMA = cases.tuning_shape(cases.LLAMA3_8B)


def away(*pairs) -> float:
    return 10 * sum(abs(math.log2(size / best)) for size, best in pairs)


def invented(blocks: BlockSizes) -> dict:
    """The best are 256 for decode, 64 and 1024 for prefill."""
    decode = 100 + away((blocks.decode_block_kv, 256))
    prefill = 100 + away((blocks.block_q, 64), (blocks.block_kv, 1024))
    costs = {"decode": decode, "prefill": prefill}
    return {
        phase: dict.fromkeys(cases.TUNING_STEPS[phase], 1000 * cost)
        for phase, cost in costs.items()
    }


def run(evaluate=invented, fits=lambda blocks, phase: True, **options):
    tried = []

    def counted(blocks):
        tried.append(blocks)
        return evaluate(blocks)

    return search.tune(DEFAULT, [], fits, counted, **options), tried


def sizes(found) -> tuple:
    return tuple(size for t in found.values() for size in t.blocks.values())


def test_it_climbs_to_the_best_of_each_phase():
    found, tried = run()
    assert sizes(found) == (256, 64, 1024)
    assert found["decode"].default_cycles == invented(DEFAULT)["decode"]
    assert found["decode"].cycles == invented(BlockSizes(256, 64, 1024))["decode"]
    assert len(set(tried)) == len(tried) < 16


def test_both_phases_share_a_compilation():
    """As many as the longer of the two searches needs, not as both."""
    _, tried = run(extent="all")
    axes = {
        phase: [search.SIZES[n] for n in names] for phase, names in tuned.PHASES.items()
    }
    counts = {phase: math.prod(map(len, sizes)) for phase, sizes in axes.items()}
    assert len(tried) == counts["prefill"] > counts["decode"]


def test_a_recheck_tries_the_default_and_the_file_only():
    other = BlockSizes(512, 128, 512)
    tried = []

    def counted(blocks):
        tried.append(blocks)
        return invented(blocks)

    found = search.tune(
        DEFAULT, [other], lambda blocks, phase: True, counted, extent="starts"
    )
    assert tried == [DEFAULT, other]
    assert sizes(found) == (512, 128, 512)


def test_a_candidate_that_does_not_fit_is_not_compiled():
    found, tried = run(fits=lambda blocks, phase: blocks.block_kv <= 512)
    assert max(blocks.block_kv for blocks in tried) == 512
    assert sizes(found) == (256, 64, 512)


def test_a_candidate_that_does_not_compile_costs_the_other_phase_nothing():
    def fails(blocks):
        if blocks.decode_block_kv == 512:
            raise search.CandidateError
        return invented(blocks)

    found, _ = run(fails)
    assert sizes(found) == (1024, 64, 1024)
    found, _ = run(fails, extent="all")
    assert sizes(found) == (256, 64, 1024)


def test_a_default_that_does_not_work_is_an_error():
    def fails(blocks):
        raise search.CandidateError("out of registers")

    with pytest.raises(search.CandidateError, match="out of registers"):
        run(fails)


def test_the_default_stays_unless_it_is_beaten_by_two_percent():
    def close(blocks):
        return {
            phase: {step: cost * (0.985 if blocks != DEFAULT else 1) for step in ("a",)}
            for phase, cost in (("decode", 1000), ("prefill", 1000))
        }

    found, _ = run(close)
    assert sizes(found) == (1024, 256, 512)
    assert found["prefill"].cycles == found["prefill"].default_cycles


def test_a_limit_is_kept_if_a_candidate_can():
    """The best of prefill, 64 and 1024, takes too long in one step."""
    slow = "1*2048/8100"

    def one_slow_step(blocks):
        costs = invented(blocks)
        if (blocks.block_q, blocks.block_kv) == (64, 1024):
            costs["prefill"][slow] *= 1.2
        return costs

    found, _ = run(one_slow_step)
    assert sizes(found) == (256, 64, 1024)
    found, _ = run(one_slow_step, limits={"prefill": {slow: 110_000}}, extent="all")
    assert sizes(found)[0] == 256
    assert found["prefill"].cycles[slow] == 110_000
    found, _ = run(one_slow_step, limits={"prefill": {slow: 1}}, extent="all")
    assert sizes(found) == (256, 64, 1024)


def test_the_limits_of_float8_are_the_cycles_of_bfloat16(monkeypatch, tmp_path):
    limits = []

    def tuned_with(*arguments, **options):
        limits.append(options["limits"])
        return tune_(*arguments, **options)

    def invented_for(shape, chip, blocks):
        return invented(blocks)

    tune_ = search.tune
    monkeypatch.setattr(search, "tune", tuned_with)
    monkeypatch.setattr(trials, "predict_blocks", invented_for)
    assert tune.main(command(tmp_path, "--chips", "v6e", "--models", "llama")) == 0
    best = invented(BlockSizes(256, 64, 1024))
    assert limits == [{}, best]


def test_a_score_is_the_geometric_mean_over_steps():
    assert search._score({"a": 20, "b": 50}, {"a": 10, "b": 100}) == pytest.approx(1)


@pytest.mark.parametrize("chip", chips.COMPILED)
def test_a_large_candidate_does_not_fit_and_says_so(chip):
    trials.check_fits(LLAMA, chips.COMPILED[chip], DEFAULT, "decode")
    with pytest.raises(search.CandidateError, match="bytes of VMEM"):
        blocks = BlockSizes(1 << 16, 256, 512)
        trials.check_fits(LLAMA, chips.COMPILED[chip], blocks, "decode")
    trials.check_fits(LLAMA, chips.COMPILED[chip], blocks, "prefill")


def test_measured_times_are_cycles_of_the_chip(monkeypatch):
    timed = []

    def time_with_jax(case, repetition, attention):
        timed.append((case.lengths, attention.keywords["block_sizes"]))
        return "TPU v6 lite", timing.summarize([1e-6, 2e-6, 9e-6])

    monkeypatch.setattr(measurement, "time_with_jax", time_with_jax)
    found = trials.time_blocks(LLAMA, chips.V6E, DEFAULT)
    steps = [step for s in cases.TUNING_STEPS.values() for step in s.values()]
    assert timed == [(step, DEFAULT) for step in steps]
    assert found["decode"]["128*1/300"] == pytest.approx(2e-6 * 1.755e9)

    def fails(*_):
        raise ValueError("block_sizes: too large")

    monkeypatch.setattr(measurement, "time_with_jax", fails)
    with pytest.raises(search.CandidateError, match="too large"):
        trials.time_blocks(LLAMA, chips.V6E, DEFAULT)


@pytest.fixture
def fake_compiler(monkeypatch):
    """Costs by invention; ``limit`` interrupts it."""
    state = {"tried": [], "limit": math.inf}

    def predict_blocks(shape, chip, blocks):
        if len(state["tried"]) >= state["limit"]:
            raise KeyboardInterrupt
        state["tried"].append((shape, chip.name, blocks))
        return invented(blocks)

    monkeypatch.setattr(trials, "predict_blocks", predict_blocks)
    return state


def command(tmp_path, *arguments: str) -> list[str]:
    files = ["--journal", tmp_path / "tune.jsonl", "--output", tmp_path / "blocks.json"]
    return [*map(str, files), *arguments]


def test_an_interrupted_run_continues(fake_compiler, tmp_path):
    arguments = command(tmp_path, "--chips", "v6e", "v5e", "--models", "llama")
    fake_compiler["limit"] = 5
    with pytest.raises(KeyboardInterrupt):
        tune.main(arguments)
    assert len(fake_compiler["tried"]) == 5
    fake_compiler["limit"] = math.inf
    assert tune.main(arguments) == 0
    assert len(set(fake_compiler["tried"])) == len(fake_compiler["tried"])
    done = len(fake_compiler["tried"])
    for again in ([], ["--recheck"]):
        assert tune.main([*arguments, *again]) == 0
        assert len(fake_compiler["tried"]) == done


def test_the_data_file_has_what_was_found_and_keeps_the_rest(fake_compiler, tmp_path):
    path = tmp_path / "blocks.json"
    custom = ["--custom", "--heads", "4", "--kv-heads", "4", "--window", "512"]
    tune.main(command(tmp_path, "--chips", "v6e", *custom))
    tune.main(command(tmp_path, "--chips", "v5e", "--models", "mqa", "--jobs", "2"))
    records = tuned.parse(path.read_text())
    assert len(records) == 2 + 2 * 2
    (decode,) = (r for r in records if r.chip == "v6e" and r.phase == "decode")
    assert decode.shape == tuned.TunedShape(
        "bfloat16", "bfloat16", 4, 4, 128, 128, sliding_window=512
    )
    assert decode.blocks == {"decode_block_kv": 256}
    assert decode.default_blocks != decode.blocks
    assert decode.kind == "prediction"
    assert set(decode.cycles) == set(cases.TUNING_STEPS["decode"])
    assert decode.speedup > 1
    assert set(decode.versions) == {"date", "commit", "jax", "libtpu"}


def test_candidates_that_fail_are_noted(monkeypatch, tmp_path, capsys):
    def fails(shape, chip, blocks):
        raise search.CandidateError("the compiler gave up")

    monkeypatch.setattr(trials, "predict_blocks", fails)
    arguments = command(tmp_path, "--chips", "tpu7x", "--models", "llama")
    assert tune.main(arguments) == 1
    assert "the default does not work: the compiler gave up" in capsys.readouterr().out
    known = journal.Journal(tmp_path / "tune.jsonl", journal.fingerprint())
    failures = [record["failure"] for record in known.records.values()]
    assert "the compiler gave up" in failures
    assert any("bytes of VMEM" in failure for failure in failures)
    assert not (tmp_path / "blocks.json").exists()


def test_every_candidate_is_told_where_there_is_no_terminal(
    fake_compiler, tmp_path, capsys
):
    assert tune.main(command(tmp_path, "--chips", "v6e", "--models", "mqa")) == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == len(fake_compiler["tried"])
    assert told[0].startswith("0 results, trying decode_block_kv ")
    assert told[0].endswith(" on v6e")


def test_a_journal_of_another_kernel_is_refused(fake_compiler, tmp_path, capsys):
    journal.Journal(tmp_path / "tune.jsonl", {"kernel": "old"})
    assert tune.main(command(tmp_path, "--chips", "v6e")) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert fake_compiler["tried"] == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--jobs", "0"], "expected at least 1"),
        (["--measure", "--chips", "v6e"], "the chip there is"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        tune.parse_arguments(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(machine.has_tpu(), reason="there is a TPU")
def test_without_a_tpu_it_cannot_measure():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tune", "--measure"],
        cwd=environment.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no TPU" in done.stderr

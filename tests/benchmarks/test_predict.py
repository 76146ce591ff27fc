"""The command line of predict, on a toy kernel in place of the compiler."""

import dataclasses
import importlib.util
import json
import re

import pytest

from benchmarks import (
    cases,
    compiler,
    environment,
    predict,
    prediction,
    tpu_timing,
)
from benchmarks.tpu_timing import load_kernel
from jax_kernels import chips
from tests.benchmarks import synthetic_dump

DECODE = "llama-decode-128x1k"


@pytest.fixture
def toy_compiler(tmp_path, monkeypatch):
    """The toy kernel loops kv_lens[0] times and fetches 32 KiB each time."""
    program = load_kernel(synthetic_dump.write(tmp_path), "toy")
    compiled = []

    def compile_program(shape, chip):
        compiled.append((shape, chip))
        return program

    monkeypatch.setattr(compiler, "compile_program", compile_program)
    return compiled


@pytest.fixture
def one_simulation(toy_compiler, monkeypatch):
    """All cases take as long as the first: for what is printed of many."""
    results = []

    def simulate(*arguments, **options):
        if not results:
            results.append(tpu_timing.simulate(*arguments, **options))
        return results[0]

    monkeypatch.setattr(prediction, "simulate", simulate)


def test_header_comes_first_and_says_predicted(toy_compiler, capsys):
    assert predict.main(["--case", DECODE, "--chip", "v6e"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("# chip v6e, commit ")
    for word in ("jax 0.", "libtpu ", "PREDICTED from the compiled schedule"):
        assert word in lines[1]
    assert lines[2].startswith(f"{DECODE}: 32/8 heads of 128")
    assert lines[3].startswith("  decode_block_kv ")
    assert "PREDICTED time" in lines[4]
    assert toy_compiler == [(cases.BY_NAME[DECODE].shape, "v6e")]


def test_json_holds_the_shares_and_where_the_cycles_went(toy_compiler, tmp_path):
    path = tmp_path / "out.json"
    assert predict.main(["--case", DECODE, "--scaling", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["kind"] == "prediction"
    (case,) = content["cases"]
    assert (case["case"], case["chip"]) == (DECODE, "tpu7x")
    assert case["result"]["bytes_moved"]["hbm_to_vmem"] == 1024 * 32768
    assert case["mbu"] > 0
    assert case["blocks"]["blocks"]["decode_block_kv"] >= 128
    assert case["blocks"]["decode_source"].startswith(("model", "tuned"))
    contexts = [point["lengths"] for point in content["scaling"][0]]
    assert contexts[0] == "128*1/128" and contexts[-1] == "128*1/16384"
    batches = [point["lengths"] for point in content["scaling"][1]]
    assert batches == [f"{2**n}*1/1024" for n in range(8)]


def test_json_to_standard_output_is_nothing_but_json(toy_compiler, capsys):
    assert predict.main(["--case", DECODE, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "prediction"


def test_cases_of_one_shape_are_compiled_once(toy_compiler, capsys):
    names = ["llama-decode-128x512", "llama-prefill-2k-at-8k", "llama-decode-8x1k"]
    lines = list(
        predict.table(prediction.predict_all(cases.select(names), chips.TPU7X))
    )
    assert len(lines) == 2 + 3
    assert len(toy_compiler) == 2


def test_any_shape_can_be_given(toy_compiler):
    arguments = ["--seqs", "2*1/100,8/50", "--heads", "8", "--kv-heads", "1"]
    arguments += ["--cache-dtype", "int8", "--page-size", "16", "--window", "20"]
    arguments += ["--sinks", "--no-causal", "--num-tokens", "16", "--q-scale", "0.5"]
    arguments += ["--probabilities-dtype", "float8_e4m3fn"]
    assert predict.main(arguments) == 0
    ((shape, _),) = toy_compiler
    model = cases.Model(8, 1, 128, sliding_window=20, with_sinks=True)
    assert shape == cases.StaticShape(
        model,
        16,
        3,
        7,
        page_size=16,
        cache_dtype="int8",
        causal=False,
        q_scale=0.5,
        probabilities_dtype="float8_e4m3fn",
    )


def test_trace_is_a_chrome_trace(toy_compiler, tmp_path):
    path = tmp_path / "trace.json"
    assert predict.main(["--case", DECODE, "--trace", str(path)]) == 0
    events = json.loads(path.read_text())["traceEvents"]
    assert {"core", "toy.1"} <= set(events[0]["args"]["name"].split())
    assert any(event["name"] == "32768 B" for event in events)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--case", "nothing"],
        ["--seqs", "1"],
        ["--seqs", "9/3"],
        ["--seqs", "16/128,1/128"],
        ["--seqs", "1/128", "--page-size", "0"],
        ["--seqs", "1/128", "--page-size", "12"],
        ["--seqs", "1/128", "--efficiency", "0"],
        ["--seqs", "1/128", "--latency-us", "-1"],
    ],
)
def test_bad_cases_are_named_on_one_line(toy_compiler, arguments, capsys):
    assert predict.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert toy_compiler == []


def test_what_the_compiler_refuses_is_told_without_a_traceback(monkeypatch, capsys):
    def compile_program(shape, chip):
        raise RuntimeError("compiling failed:\nValueError: q: expected other heads")

    monkeypatch.setattr(predict.compiler, "compile_program", compile_program)
    assert predict.main(["--case", DECODE]) == 2
    assert "error: compiling failed:\nValueError: q" in capsys.readouterr().err


def test_exactly_one_choice_of_cases(capsys):
    with pytest.raises(SystemExit):
        predict.main(["--table", "--case", DECODE])
    assert "exactly one of" in capsys.readouterr().err


def test_a_failed_compilation_shows_the_last_words_of_the_compiler():
    shape = cases.StaticShape(cases.Model(3, 2, 128), 1, 1, 1)  # 3 heads in 2 groups
    with pytest.raises(
        RuntimeError, match=r"exit status 1:(.|\n)*2 key heads(.|\n)*got 3"
    ):
        compiler.compile_program(shape, "tpu7x")


def test_only_the_files_that_are_read_are_kept(tmp_path):
    kept = [f"1-rpa-{number}-{part}.txt" for number, part in enumerate(compiler.KEPT)]
    for name in (*kept, "1-rpa-9-memory-space.txt", "1-copy-71-final_bundles.txt"):
        (tmp_path / name).touch()
    (tmp_path / "graphs").mkdir()
    compiler.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_compilation_that_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr(compiler, "MAX_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match=r"took more than 0\.1 seconds"):
        compiler.compile_program(cases.BY_NAME[DECODE].shape, "tpu7x")


def test_baseline_is_cycles_by_case(toy_compiler, tmp_path):
    path = tmp_path / "baseline.json"
    predict.main(["--case", DECODE, "--baseline", str(path)])
    content = json.loads(path.read_text())
    assert set(content) == {"kind", "chip", "jax", "libtpu", "cycles"}
    assert list(content["cycles"]) == [DECODE]


def test_baseline_keeps_other_cases_of_the_same_versions(toy_compiler, tmp_path):
    path = tmp_path / "baseline.json"
    other = "llama-decode-128x512"
    predict.main(["--case", other, "--baseline", str(path)])
    predict.main(["--case", DECODE, "--baseline", str(path)])
    content = json.loads(path.read_text())
    assert list(content["cycles"]) == [other, DECODE]
    path.write_text(json.dumps(content | {"libtpu": "older"}))
    predict.main(["--case", DECODE, "--baseline", str(path)])
    assert list(json.loads(path.read_text())["cycles"]) == [DECODE]


def test_the_record_of_the_doctor_keeps_other_chips_and_cases(toy_compiler, tmp_path):
    path = tmp_path / "predictions.json"
    other = "llama-decode-128x512"
    for chip, name in (("v6e", DECODE), ("tpu7x", other), ("tpu7x", DECODE)):
        predict.main(["--chip", chip, "--case", name, "--doctor", str(path)])
    content = json.loads(path.read_text())
    assert content["kind"] == "prediction"
    found = {chip: set(record["cases"]) for chip, record in content["chips"].items()}
    assert found == {"tpu7x": {other, DECODE}, "v6e": {DECODE}}
    record = content["chips"]["v6e"]["cases"][DECODE]
    assert record["default_clock_microseconds"] is None  # v6e has one clock
    low, high = record["expected"]
    assert record["microseconds"] > 0 and 0 < low < high


def test_several_tables_are_updated_in_one_run(one_simulation, tmp_path):
    path = tmp_path / "page.md"
    names = ("main", "deployments")
    marks = [f"<!-- predicted {name} tpu7x -->" for name in names]
    path.write_text("\n".join(f"{mark}\n{mark}" for mark in marks))
    assert predict.main(["--table", *names, "--update", str(path)]) == 0
    _, main, _, deployments, _ = re.split("|".join(marks), path.read_text())
    assert "| llama-decode-128x512 |" in main
    assert "deploy" not in main
    assert "| deploy-8x1-dec256 |" in deployments


def test_plot_without_matplotlib_names_the_remedy(monkeypatch, toy_compiler):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        predict.main(["--case", DECODE, "--plot", "unused.png"])
    assert toy_compiler == []


@pytest.mark.slow
def test_plot_is_a_picture(toy_compiler, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    assert predict.main(["--case", DECODE, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("table, chip", [("models", "v6e"), ("main", "tpu7x")])
def test_update_replaces_one_table_of_the_file(one_simulation, tmp_path, table, chip):
    path = tmp_path / "page.md"
    marks = ("main tpu7x", "models tpu7x", "models v6e")
    old = [f"<!-- predicted {m} -->\nold {m}\n<!-- predicted {m} -->\n" for m in marks]
    path.write_text("".join(["before\n", *old, "after\n"]))
    arguments = ["--table", table, "--chip", chip, "--update", str(path)]
    for _ in range(2):
        assert predict.main(arguments) == 0
        lines = path.read_text().splitlines()
        assert (lines[0], lines[-1]) == ("before", "after")
        assert {f"old {m}" for m in marks} & set(lines) == {
            f"old {m}" for m in marks if m != f"{table} {chip}"
        }
        names = [case.name for case in cases.TABLES[table]]
        assert [sum(f"| {name} |" in line for line in lines) for name in names] == [
            1
        ] * len(names)
        assert any(f"chip {chip}" in line and "PREDICTED" in line for line in lines)


def test_update_of_a_file_without_marks_is_an_error(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("nothing")
    with pytest.raises(ValueError, match="expected 2 lines <!-- m -->, got 0"):
        environment.update_markdown(str(path), "<!-- m -->", [])
    assert path.read_text() == "nothing"


def test_update_is_checked_before_anything_is_compiled(tmp_path, capsys):
    with pytest.raises(SystemExit):
        predict.main(["--table", "--update", str(tmp_path / "page.md")])
    assert "page.md: expected a file with 2 lines" in capsys.readouterr().err


def test_update_needs_a_table(capsys):
    with pytest.raises(SystemExit):
        predict.main(["--case", DECODE, "--update", "unused.md"])
    assert "expected --table" in capsys.readouterr().err


def test_operations_around_the_kernel_are_a_figure_of_their_own(toy_compiler, capsys):
    def compile_program(shape, chip):
        program = toy(shape, chip)
        return dataclasses.replace(program, bytes_around=0.92 * 3.69e12 * 5e-6)

    toy = compiler.compile_program
    case = cases.BY_NAME[DECODE]
    alone = prediction.predict(case, chips.TPU7X, toy(case.shape, "tpu7x"))
    program = compile_program(case.shape, "tpu7x")
    found = prediction.predict(case, chips.TPU7X, program)
    assert found.result.cycles == alone.result.cycles
    assert (alone.around_us, found.around_us) == (0, pytest.approx(5))
    assert found.total_us == pytest.approx(alone.total_us + 5)
    assert found.of_bound == pytest.approx(found.bound_us / found.total_us)
    assert "operations of XLA around the kernel: 5.0 us" in predict.details(found)
    (row,) = list(predict.table([found]))[2:]
    assert f"| {alone.total_us:.1f} + 5.0 |" in row

"""From published cells to calls, comparisons and tables; no peer is compiled."""

from __future__ import annotations

import dataclasses
import math
import re
import types
from pathlib import Path

import pytest

from benchmarks import accuracy, calibrate, calibration, environment, published
from benchmarks.accuracy import Comparison
from jax_kernels import chips

CELLS = {cell.name: cell for cell in calibration.comparable_cells()}
PREFILL = CELLS["rpa_v3 tpu7x 32/4x256 8192/8192 (flywheel_v7x)"]
DECODE = CELLS["rpa_v3 tpu7x 32/4x256 128*1/15872 (flywheel_v7x_cache)"]
CHUNKS = CELLS["rpa_v3 tpu7x 32/32x256 16384 by 1024 (flywheel_v7x_cache)"]
TRANSPOSED = next(cell for cell in CELLS.values() if cell.transposed_bytes)


def test_only_cells_whose_program_is_known_are_compared():
    assert len(CELLS) >= 30
    assert {cell.kernel for cell in CELLS.values()} == {"rpa_v3", "splash", "flywheel"}
    assert all(cell.program_known and not cell.unusable for cell in CELLS.values())


def test_a_cell_becomes_the_calls_whose_times_it_adds_up():
    calls = calibration.peer_calls([PREFILL, CHUNKS])
    (prefill,) = calls[PREFILL.name]
    assert prefill.blocks == PREFILL.blocks
    assert prefill.page_size == PREFILL.page_size
    assert prefill.libtpu == "0.0.44"
    assert [call.sequences[0].kv_len for call in calls[CHUNKS.name]] == [
        *range(1024, 16385, 1024)
    ]
    assert len({call.capacity for call in calls[CHUNKS.name]}) == 1


@pytest.fixture
def predicted(monkeypatch):
    """Every call takes 1000 us; returns the clocks that were asked for."""
    clocks = []

    def predict_call(call, directory, python, *, programs, clock):
        clocks.append(clock)
        return types.SimpleNamespace(
            microseconds=1000.0, versions={"libtpu": call.libtpu or "0.0.52"}
        )

    monkeypatch.setattr(calibration, "predict_call", predict_call)
    return clocks


def _compare(cell: published.Cell) -> Comparison:
    return calibration.compare(cell, calibration.peer_calls([cell])[cell.name])


def test_the_times_of_all_calls_are_added(predicted):
    assert _compare(CHUNKS).predicted_us == 16_000
    assert _compare(CHUNKS).published_us == 26_020
    assert _compare(DECODE).kind == "decode"


def test_transposes_around_the_kernel_move_bytes_at_the_speed_of_copies(predicted):
    rates = chips.COMPILED[TRANSPOSED.chip].rates
    extra = TRANSPOSED.transposed_bytes / (0.92 * rates.hbm_bytes_per_s)
    assert _compare(TRANSPOSED).predicted_us == pytest.approx(1000 + 1e6 * extra)


@pytest.mark.parametrize(
    ("stated", "clock"),
    [("locked", "highest"), ("default", "default"), ("not stated", "default")],
)
def test_a_cell_is_predicted_at_the_clock_that_it_was_measured_at(
    predicted, stated, clock
):
    source = dataclasses.replace(PREFILL.source, clock=stated)
    comparison = _compare(dataclasses.replace(PREFILL, source=source))
    assert predicted == [clock]
    assert comparison.clock == clock


@pytest.fixture
def record(monkeypatch, tmp_path):
    file = tmp_path / "calibration.json"
    monkeypatch.setattr(accuracy, "FILE", file)
    monkeypatch.setattr(accuracy.read, "__defaults__", (file,))
    monkeypatch.setattr(accuracy.add, "__defaults__", (file,))
    return file


def test_a_run_goes_on_where_it_was(record, predicted, capsys):
    assert calibrate.main(["--cell", "32/4x256 8192/8192", "--kernel", "rpa_v3"]) == 0
    assert len(predicted) == 1
    assert calibrate.main(["--cell", "32/4x256", "--kernel", "rpa_v3"]) == 0
    cells = [c for c in CELLS if "32/4x256" in c and c.startswith("rpa_v3")]
    assert len(accuracy.read(record)) == len(cells)
    assert len(predicted) == sum(len(CELLS[name].steps) for name in cells)
    assert calibrate.main(["--cell", "32/4x256 8192/8192", "--again"]) == 0


def test_a_cell_that_fails_is_named_and_the_others_are_compared(
    record, predicted, monkeypatch, capsys
):
    working = calibration.predict_call

    def predict_call(call, *arguments, **options):
        if call.sequences[0].kv_len == 8192:
            raise RuntimeError("no compiler")
        return working(call, *arguments, **options)

    monkeypatch.setattr(calibration, "predict_call", predict_call)
    names = ["32/4x256 8192/8192", "32/4x256 4096/4096"]
    assert calibrate.main(["--kernel", "rpa_v3", "--cell", *names]) == 1
    assert f"{PREFILL.name}: no compiler" in capsys.readouterr().err
    assert len(accuracy.read(record)) == 1


def test_what_another_run_adds_meanwhile_stays(record, predicted, monkeypatch):
    working = calibration.predict_call

    def predict_call(*arguments, **options):
        accuracy.add(_compare_with(working, DECODE))
        return working(*arguments, **options)

    monkeypatch.setattr(calibration, "predict_call", predict_call)
    names = ["--kernel", "rpa_v3", "--cell", "32/4x256 8192/8192"]
    assert calibrate.main(names) == 0
    assert {c.cell for c in accuracy.read(record)} == {PREFILL.name, DECODE.name}


def _compare_with(predict_call, cell: published.Cell) -> Comparison:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "predict_call", predict_call)
        return _compare(cell)


def test_a_program_does_not_depend_on_which_cells_are_chosen(record, monkeypatch):
    capacities = []

    def compare(cell, calls, directory, python, *, clock):
        capacities.append(calls[0].capacity)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(calibration, "compare", compare)
    assert calibrate.main(["--cell", DECODE.name]) == 1
    everything = calibration.peer_calls(CELLS.values())
    assert capacities == [everything[DECODE.name][0].capacity]
    assert capacities != [calibration.peer_calls([DECODE])[DECODE.name][0].capacity]


@pytest.mark.parametrize("option", [[], ["--list"], ["--table"]])
def test_a_name_of_no_cell_is_an_error(record, option, capsys):
    assert calibrate.main(["--cell", "nothing", *option]) == 2
    assert "no cell has such a name" in capsys.readouterr().err


def test_a_record_that_is_cut_off_is_told_before_anything_is_compiled(
    record, predicted, capsys
):
    record.write_text('{"comp')
    assert calibrate.main(["--cell", DECODE.name]) == 2
    assert "calibration.json: expected comparisons" in capsys.readouterr().err
    assert not predicted


def test_a_table_of_nothing_is_an_error(record, capsys):
    assert calibrate.main(["--table"]) == 1
    assert "there are no comparisons" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "no marks"])
def test_where_the_tables_go_is_checked_first(
    record, predicted, capsys, tmp_path, text
):
    page = tmp_path / "page.md"
    if text:
        page.write_text(text)
    with pytest.raises(SystemExit):
        calibrate.main(["--cell", DECODE.name, "--update", str(page)])
    assert f"--update: {page}: expected" in capsys.readouterr().err
    assert not predicted


def test_the_tables_have_groups_ranges_and_every_comparison(predicted):
    known = [_compare(cell) for cell in (PREFILL, DECODE, CHUNKS)]
    text = "\n".join(calibrate.tables(known))
    assert "| all | 3 |" in text
    assert "| decode | 1 |" in text
    assert "| rpa_v3 | - |" in text
    assert text.count("(flywheel_v7x") == 3


def test_the_record_has_the_cells_of_today():
    """A cell that was published or changed since wants another comparison."""
    for comparison in accuracy.read():
        cell = CELLS[comparison.cell]
        assert comparison.published_us == pytest.approx(cell.microseconds)
        assert comparison.kind == cell.kind
        assert comparison.held_back == cell.held_back


def test_predictions_hold():
    """What is promised of predictions; see the table in ``benchmarks/README.md``."""
    known = accuracy.read()
    assert len(known) >= 30
    everything = accuracy.summarize(known)
    assert everything.median_error <= 0.07
    assert everything.ninth_decile <= 0.15
    for kernel in ("rpa_v3", "splash", "flywheel"):
        of_kernel = accuracy.summarize(c for c in known if c.kernel == kernel)
        assert 0.93 <= of_kernel.bias <= 1.07, kernel


def test_calls_have_the_blocks_of_their_cells():
    for name, calls in calibration.peer_calls(CELLS.values()).items():
        assert all(call.blocks == (CELLS[name].blocks or {}) for call in calls)


def test_another_compiler_can_be_asked_for():
    calls = calibration.peer_calls([PREFILL, DECODE], {PREFILL.name: "0.0.52"})
    assert calls[PREFILL.name][0].libtpu == "0.0.52"
    assert calls[DECODE.name][0].libtpu == "0.0.44"


def test_a_cell_is_compiled_again_with_the_release_on_record(record, predicted):
    cell = ["--cell", DECODE.name]
    assert calibrate.main([*cell, "--libtpu", "0.0.52"]) == 0
    assert calibrate.main([*cell, "--again"]) == 0
    (comparison,) = accuracy.read(record)
    assert comparison.libtpu == "0.0.52"
    assert len(predicted) == 2
    assert calibrate.main([*cell, "--again", "--libtpu", "0.0.44"]) == 0
    assert accuracy.read(record)[0].libtpu == "0.0.44"


def test_the_first_page_says_what_the_record_says():
    """After ``benchmarks.calibrate``, the table of README.md wants the new ranges."""
    text = " ".join(Path(environment.ROOT, "README.md").read_text().split())
    summary = accuracy.summarize(c for c in accuracy.read() if c.chip == "tpu7x")
    assert f"It comes from {summary.count} published times" in text
    # Rounded up: tenths would promise too much.
    assert f"were within {math.ceil(100 * summary.median_error)} % of the" in text
    assert f"nine in ten within {math.ceil(100 * summary.ninth_decile)} %" in text
    says_few = "were compared, as decode, has the range of all" in text
    assert says_few == (accuracy.expected("decode", "tpu7x").of == "all on tpu7x")
    for step, kind in (
        ("decode of 128 sequences", "decode"),
        ("prefill of 8K tokens, heads of 128", "prefill-128"),
        ("prefill of 8K tokens, heads of 256", "prefill-256"),
    ):
        (row,) = re.findall(rf"\| ({step}[^|]*\|[^|]*\|[^|]*)\|", text)
        assert row.rstrip().endswith(str(accuracy.expected(kind, "tpu7x")))


def test_a_trial_leaves_the_record_alone(record, predicted, capsys):
    cell = ["--cell", PREFILL.name]
    assert calibrate.main(cell) == 0
    before = record.read_text()
    assert calibrate.main([*cell, "--trial", "--clock", "highest"]) == 0
    assert record.read_text() == before
    assert predicted == ["default", "highest"]
    assert f"| {PREFILL.name} | highest |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clock", "highest"], "--clock: expected --trial"),
        (["--trial", "--table"], "--trial: expected neither"),
    ],
)
def test_a_trial_is_asked_for_by_its_name(arguments, message, capsys):
    with pytest.raises(SystemExit):
        calibrate.main(arguments)
    assert message in capsys.readouterr().err

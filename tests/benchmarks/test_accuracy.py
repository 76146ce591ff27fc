"""Errors of predictions, and the ranges that follow from them."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import accuracy
from benchmarks.accuracy import Comparison
from benchmarks.tpu_timing.workloads import Sequence

BASE = Comparison(
    cell="a",
    kernel="rpa_v3",
    chip="tpu7x",
    kind="decode",
    held_back=False,
    clock="default",
    predicted_us=100.0,
    published_us=104.0,
    libtpu="0.0.44",
    measured_with="0.0.44",
)


def comparisons(kind: str, *ratios: float) -> list[Comparison]:
    return [
        dataclasses.replace(
            BASE, cell=f"{kind} {i}", kind=kind, published_us=100 * ratio
        )
        for i, ratio in enumerate(ratios)
    ]


def test_the_ratio_says_how_much_longer_it_took_and_the_error_is_of_what_was_measured():
    assert BASE.ratio == pytest.approx(1.04)
    assert BASE.error == pytest.approx(4 / 104)


def test_a_range_covers_nine_in_ten_and_is_rounded_outwards():
    known = comparisons("decode", *(1 + i / 1000 for i in range(21)))
    expected = accuracy.expected("decode", "tpu7x", known)
    assert (expected.low, expected.high) == (1.0, 1.02)
    assert (expected.count, expected.of) == (21, "decode on tpu7x")
    inside = [c for c in known if expected.low <= c.ratio <= expected.high]
    assert len(inside) >= 0.9 * len(known)


def test_a_range_below_one_is_rounded_outwards_too():
    expected = accuracy.expected("short", "tpu7x", comparisons("short", *[0.954] * 10))
    assert (expected.low, expected.high) == (0.95, 0.96)
    assert str(expected) == "0.95 to 0.96"


def test_a_kind_with_too_few_comparisons_takes_those_of_all_kinds_on_its_chip():
    known = [*comparisons("decode", *[1.0] * 10), *comparisons("short", *[1.2] * 9)]
    others = [dataclasses.replace(c, chip="v6e") for c in comparisons("short", 9.0)]
    expected = accuracy.expected("short", "tpu7x", [*known, *others])
    assert (expected.count, expected.of) == (19, "all on tpu7x")
    assert (expected.low, expected.high) == (1.0, 1.2)
    of_kind = accuracy.expected("decode", "tpu7x", [*known, *others])
    assert of_kind.of == "decode on tpu7x"


def test_a_kind_that_was_never_compared_on_its_chip_takes_all_there_are():
    known = comparisons("decode", *[1.0] * 10)
    assert accuracy.expected("short", "tpu7x", known).of == "all"


def test_a_chip_with_too_few_comparisons_takes_all_there_are():
    known = comparisons("decode", *[1.0] * 10)
    assert accuracy.expected("decode", "v5e", known).of == "all"


def test_no_range_without_comparisons():
    with pytest.raises(ValueError, match="comparisons: expected at least one"):
        accuracy.expected("decode", "tpu7x", [])


def test_a_summary_has_the_sizes_of_errors_and_which_way_they_lean():
    summary = accuracy.summarize(comparisons("decode", *[1.0] * 8, 1.25, 2.0))
    assert summary.count == 10
    assert summary.median_error == 0
    assert summary.ninth_decile == pytest.approx(0.2)
    assert summary.bias == 1.0


def test_a_range_is_tested_by_a_kernel_that_had_no_part_in_it():
    others = comparisons("decode", *[1.0] * 5, *[1.1] * 5)
    own = [
        dataclasses.replace(c, cell=f"own {c.cell}", kernel="splash")
        for c in comparisons("decode", 0.9, 1.05, 1.09, 1.2)
    ]
    assert accuracy.count_within_others("splash", [*others, *own]) == (2, 4)
    assert accuracy.count_within_others("splash", own) is None


def test_the_record_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "calibration.json"
    known = comparisons("decode", 1.1, 0.9)
    accuracy.write(reversed(known), file)
    assert accuracy.read(file) == known


def test_a_comparison_takes_the_place_of_an_older_one_of_its_cell(tmp_path):
    file = tmp_path / "calibration.json"
    first, second = comparisons("decode", 1.1, 0.9)
    accuracy.add(first, file)
    accuracy.add(second, file)
    accuracy.add(dataclasses.replace(first, published_us=120.0), file)
    assert [c.ratio for c in accuracy.read(file)] == pytest.approx([1.2, 0.9])
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_record_that_is_not_there_is_empty(tmp_path):
    assert accuracy.read(tmp_path / "calibration.json") == []


@pytest.mark.parametrize(
    "text", ['{"comparisons": [{"cell', "{}", '{"comparisons": 1}']
)
def test_a_record_that_is_cut_off_is_named(tmp_path, text):
    file = tmp_path / "calibration.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"calibration\.json: expected comparisons"):
        accuracy.read(file)


@pytest.mark.parametrize(
    ("microseconds", "sequences", "head_dim", "kind"),
    [
        (99, [Sequence(512, 512)], 128, "short"),
        (101, [Sequence(1, 8192)] * 4, 128, "decode"),
        (101, [Sequence(1, 8192), Sequence(512, 512)], 256, "prefill-256"),
        # Nothing is published of these widths: the nearest below, or the smallest.
        (101, [Sequence(512, 512)], 160, "prefill-128"),
        (101, [Sequence(512, 512)], 32, "prefill-64"),
    ],
)
def test_the_kind_of_a_step(monkeypatch, microseconds, sequences, head_dim, kind):
    known = [
        *comparisons("prefill-64", 1.0),
        *comparisons("prefill-128", 1.0),
        *comparisons("prefill-256", 1.0),
    ]
    monkeypatch.setattr(accuracy, "_recorded", lambda: known)
    assert accuracy.kind_of(microseconds, sequences, head_dim) == kind


def test_how_far_predictions_were_in_words(monkeypatch):
    known = comparisons("decode", 1.0, 1.0, 1.1)
    monkeypatch.setattr(accuracy, "_recorded", lambda: known)
    assert accuracy.in_words("tpu7x") == (
        "3 published times on tpu7x were 1.00 times their predictions in the median, "
        "nine in ten within 10 %"
    )
    assert accuracy.in_words("v5e").startswith("3 published times on other chips")
    monkeypatch.setattr(accuracy, "_recorded", tuple)
    assert accuracy.in_words("v5e") == "nothing is known of measured times"

"""A journal continues after an interruption, and only what it began."""

import json

import pytest

from benchmarks import journal


def test_records_of_an_earlier_run_are_there(tmp_path):
    path = tmp_path / "run.jsonl"
    journal.Journal(path, {"kernel": "a"}).append("one", {"us": 1.5})
    known = journal.Journal(path, {"kernel": "a"})
    assert known.records == {"one": {"us": 1.5}}
    known.append("two", {"us": 2})
    assert list(journal.Journal(path, {"kernel": "a"}).records) == ["one", "two"]


def test_a_line_that_was_cut_short_is_dropped(tmp_path):
    path = tmp_path / "run.jsonl"
    journal.Journal(path, {"kernel": "a"}).append("one", {"us": 1})
    with path.open("a") as file:
        file.write('{"key": "two", "rec')
    known = journal.Journal(path, {"kernel": "a"})
    known.append("three", {"us": 3})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("key") for line in lines] == [None, "one", "three"]


def test_results_of_another_kernel_are_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    journal.Journal(path, {"kernel": "a"}).append("one", {"us": 1})
    before = path.read_text()
    with pytest.raises(ValueError, match=r"'b'.*got results of.*'a'.*another file"):
        journal.Journal(path, {"kernel": "b"})
    assert path.read_text() == before


def test_the_fingerprint_names_kernel_and_compiler(tmp_path):
    found = journal.fingerprint()
    assert set(found) == {"kernel", "jax", "libtpu"}
    assert found == journal.fingerprint()
    data = tmp_path / "data.json"
    seen = set()
    for text in ("1", "2"):
        data.write_text(text)
        seen.add(journal.fingerprint(data)["kernel"])
    assert len(seen | {found["kernel"]}) == 3

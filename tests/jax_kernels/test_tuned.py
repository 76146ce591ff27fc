"""Tuned block sizes: which record is nearest, and what a file may hold."""

import dataclasses
import json
import math
import os

import pytest

from jax_kernels import chips, tuned

SHAPE = tuned.TunedShape("bfloat16", "bfloat16", 32, 8, 128, 128)


def record(
    phase: str = "decode", size: int = 512, chip: str = "v6e", **shape
) -> tuned.TunedBlocks:
    return tuned.TunedBlocks(
        chip=chip,
        phase=phase,
        shape=dataclasses.replace(SHAPE, **shape),
        blocks=dict.fromkeys(tuned.PHASES[phase], size),
        default_blocks=dict.fromkeys(tuned.PHASES[phase], 256),
        kind="prediction",
        cycles={"a": 100, "b": 100},
        default_cycles={"a": 400, "b": 100},
        versions={"date": "2026-01-01"},
    )


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, 0),
        ({"num_q_heads": 64}, 1),  # twice the group
        ({"num_q_heads": 64, "num_kv_heads": 16}, 1),  # the same group
        ({"head_dim": 64}, 1),
        ({"head_dim": 96}, math.log2(128 / 96)),
        ({"page_size": 16}, 3),
        ({"cache_dtype": "float8_e4m3fn"}, 1 + tuned.OTHER_DTYPE),
        ({"page_size": 64, "head_dim": 256}, 2),
        ({"page_size": 8}, math.inf),
        ({"head_dim": 32}, math.inf),
        ({"num_q_heads": 128}, math.inf),
        ({"q_dtype": "float32"}, math.inf),
        ({"sliding_window": 4096}, math.inf),
    ],
)
def test_distance_counts_doublings_within_limits(change, expected):
    other = dataclasses.replace(SHAPE, **change)
    assert tuned.distance(SHAPE, other) == pytest.approx(expected)
    assert tuned.distance(other, SHAPE) == pytest.approx(expected)


def test_windows_are_compared_with_windows():
    near, far = (dataclasses.replace(SHAPE, sliding_window=w) for w in (128, 256))
    assert tuned.distance(near, near) == 0
    assert tuned.distance(near, far) == 1


def test_the_nearest_record_of_the_chip_and_phase_is_found():
    records = [
        record(size=64, chip="tpu7x"),
        record("prefill", size=128),
        record(size=256, page_size=32),
        record(size=512, page_size=64),
        record(size=1024, num_q_heads=64),
    ]
    nearest = tuned.find(records, "v6e", "decode", SHAPE)
    assert nearest is not None
    found, away = nearest
    assert found.blocks == {"decode_block_kv": 512}  # the first of two at distance 1
    assert away == 1
    assert tuned.find(records, "v5e", "decode", SHAPE) is None
    assert tuned.find(records[:2], "v6e", "decode", SHAPE) is None


def test_the_exact_dtype_is_preferred_to_another_of_its_size():
    records = [
        record(size=256, cache_dtype="float8_e5m2"),
        record(size=512, cache_dtype="float8_e4m3fn"),
    ]
    for dtype, expected in (("float8_e4m3fn", 512), ("int8", 256)):
        shape = dataclasses.replace(SHAPE, cache_dtype=dtype)
        nearest = tuned.find(records, "v6e", "decode", shape)
        assert nearest is not None
        assert nearest[0].blocks["decode_block_kv"] == expected


def test_a_file_is_read_as_it_was_written():
    records = (record("prefill", sliding_window=128), record(), record(chip="v5e"))
    assert set(map(str, tuned.parse(tuned.as_text(records)))) == set(map(str, records))


def test_what_is_carried_over_is_the_ratio_to_the_model():
    """512 where the model gave 256: twice the model's, whatever that is."""
    assert record().carried_over({"decode_block_kv": 2048}) == {"decode_block_kv": 4096}
    smaller = record("prefill", size=128).carried_over({"block_q": 64, "block_kv": 1})
    assert smaller == {"block_q": 32, "block_kv": 1}


def test_speedup_weighs_steps_alike():
    assert record().speedup == pytest.approx(2)  # of 4 and 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"phase": "mixed"}, "phase: expected one of"),
        ({"blocks": {"block_q": 128}}, "blocks: expected"),
        ({"blocks": {"decode_block_kv": 100}}, "decode_block_kv: expected a power of"),
        ({"default_blocks": {}}, "default_blocks: expected"),
        ({"kind": "guess"}, "kind: expected prediction or measurement, got 'guess'"),
        ({"cycles": {"a": 1}}, "cycles: expected the steps of default_cycles"),
        ({"color": "red"}, "unexpected keyword"),
        ({"shape": {"q_dtype": "bfloat16"}}, "missing"),
    ],
)
def test_a_bad_record_is_named_by_its_place(change, message):
    entry = dataclasses.asdict(record()) | change
    text = json.dumps({"records": [dataclasses.asdict(record(chip="v5e")), entry]})
    with pytest.raises(ValueError, match=f"record 1 of .*{message}"):
        tuned.parse(text)


def test_a_key_comes_once():
    with pytest.raises(ValueError, match="expected each key once"):
        tuned.parse(tuned.as_text([record(), record(size=256)]))


def test_an_unknown_dtype_is_named():
    with pytest.raises(ValueError, match=r"cache_dtype: expected one of .* 'int4'"):
        dataclasses.replace(SHAPE, cache_dtype="int4")


def test_the_shipped_file_names_chips_and_versions():
    """Its schema is checked by reading it."""
    for entry in tuned.shipped():
        assert chips.find_chip(entry.chip).name == entry.chip
        assert set(entry.versions) == {"date", "commit", "jax", "libtpu"}
        assert entry.speedup > 0.99  # no worse than the model, but for rounding


# ---- files that users keep


@pytest.fixture
def no_environment(monkeypatch):
    """As in a new process without files of users."""
    monkeypatch.delenv(tuned.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(tuned, "_users", None)


def test_a_saved_file_is_read(tmp_path):
    path = tmp_path / "mine.json"
    tuned.save(path, [record(size=64)])
    tuned.save(path, [record(), record("prefill")])
    assert set(map(str, tuned.read(path))) == {str(record()), str(record("prefill"))}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"mine\.json: expected each key once"):
        tuned.save(path, [record(), record(size=64)])
    assert len(tuned.read(path)) == 2  # the former file is left


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"records": 3}', "records"])
def test_another_file_is_named(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json: expected JSON like"):
        tuned.read(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        tuned.read(tmp_path / "missing")


def test_of_one_key_the_first_group_is_merged():
    merged = tuned.merge(
        [record(size=64)], [record(size=128), record("prefill")], [record(chip="v5e")]
    )
    assert merged == (record(size=64), record("prefill"), record(chip="v5e"))


def nearest_in_force() -> tuned.TunedBlocks:
    found = tuned.find(tuned.in_force(), "v6e", "decode", SHAPE)
    assert found is not None
    return found[0]


def test_records_of_users_go_ahead_in_a_block(no_environment, tmp_path):
    assert tuned.in_force() == tuned.shipped()
    path = tmp_path / "mine.json"
    tuned.save(path, [record(size=64)])
    with tuned.applied(path, [record(size=128), record(chip="v5e", size=32)]):
        assert tuned.in_force()[:2] == (record(size=64), record(chip="v5e", size=32))
        with tuned.applied([record(size=16)]):
            assert nearest_in_force() == record(size=16)
        assert nearest_in_force() == record(size=64)
    assert tuned.in_force() == tuned.shipped()


def test_the_token_tells_records_apart(no_environment):
    assert tuned.token() == ""
    tokens = []
    for size in (64, 32, 64):
        with tuned.applied([record(size=size)]):
            tokens.append(tuned.token())
    assert tokens[0] == tokens[2] != tokens[1]
    assert tuned.token() == ""
    # The order decides between records that are equally near.
    near = record(page_size=64), record(page_size=32)
    with tuned.applied(near):
        first = tuned.token()
    with tuned.applied(near[::-1]):
        assert tuned.token() != first


def test_the_environment_names_files(no_environment, monkeypatch, tmp_path):
    paths = [tmp_path / name for name in ("one.json", "two.json")]
    tuned.save(paths[0], [record(size=64)])
    tuned.save(paths[1], [record(size=32), record(chip="v5e")])
    names = os.pathsep.join(map(str, paths))
    monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, names)
    assert tuned.in_force()[:2] == (record(size=64), record(chip="v5e"))
    with tuned.applied([record(size=16)]):
        assert tuned.in_force()[0] == record(size=16)


def test_a_bad_file_leaves_what_is_in_force(no_environment, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="bad"), tuned.applied(path):
        pass
    assert tuned.token() == ""

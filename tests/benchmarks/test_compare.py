"""Side by side with other kernels; no kernel is compiled."""

from __future__ import annotations

import dataclasses
import types

import pytest

from benchmarks import cases, compare, published
from benchmarks.compare import Row, candidates, peer_call
from benchmarks.peers.calls import Capacity

PREFILL = cases.BY_NAME["wide-prefill-8k-causal"]
DECODE = cases.BY_NAME["llama-decode-128x8k"]


def test_a_case_becomes_the_call_that_computes_the_same():
    call = peer_call("rpa_v3", PREFILL, "tpu7x", "0.0.52")
    model = PREFILL.shape.model
    assert (call.num_q_heads, call.num_kv_heads) == (32, 8)
    assert call.head_dim == model.head_dim
    assert call.sequences == tuple(PREFILL.sequences)
    assert call.libtpu == "0.0.52"
    assert call.ideal.flops == PREFILL.ideal.flops


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("gpt-oss-decode-128x1k", "sinks"),
        ("llama-decode-fp8-128x1k", "cache of float8_e4m3fn"),
        ("llama-chunks:8*1/1024", "chunk_prefill_size"),
    ],
)
def test_what_is_not_compared_is_said(case, reason):
    with pytest.raises(NotImplementedError, match=reason):
        peer_call("rpa_v3", cases.BY_NAME[case], "tpu7x", "0.0.52")


def test_a_peer_gets_its_own_blocks_published_ones_and_sensible_ones():
    own, published, sensible = candidates(
        peer_call("rpa_v3", PREFILL, "tpu7x", "0.0.52")
    )
    assert own.blocks == {}
    assert sensible.blocks == compare.SENSIBLE_BLOCKS["rpa_v3"]["other"]
    # Of 4 and 32 key heads, 4 are nearer to 8; the context is the same.
    assert published.blocks == {
        "bq_sz": 256,
        "bkv_sz": 2048,
        "bq_csz": 128,
        "bkv_csz": 512,
    }
    assert dataclasses.replace(published, blocks={}) == own


@pytest.mark.parametrize("chip", ["tpu7x", "v6e"])
@pytest.mark.parametrize("name", ["wide-prefill-8k-causal", "wide-prefill-8k-full"])
def test_published_blocks_are_of_the_same_chip_and_mask(monkeypatch, chip, name):
    cells = [
        cell
        for cell in published.usable_cells()
        if (cell.chip, cell.causal) == (chip, cases.BY_NAME[name].shape.causal)
    ]
    call = peer_call("splash", cases.BY_NAME[name], chip, "0.0.52")
    found = candidates(call)
    monkeypatch.setattr(published, "usable_cells", lambda: cells)
    assert found == candidates(call)


def test_without_published_blocks_a_peer_has_the_others():
    own, sensible = candidates(peer_call("rpa_v3", DECODE, "tpu7x", "0.0.52"))
    assert own.blocks == {}
    assert sensible.blocks == compare.SENSIBLE_BLOCKS["rpa_v3"]["decode"]
    assert len(candidates(peer_call("flywheel", DECODE, "tpu7x", "0.0.52"))) == 1


def test_arrays_of_a_peer_are_as_large_as_ours_if_it_can_have_them_so():
    """So the steps of one program of ours are of one program of the peer."""
    names = ("deploy-8x1-dec256", "deploy-8x1-256x300")
    calls = [peer_call("rpa_v3", cases.BY_NAME[n], "tpu7x", "0.0.52") for n in names]
    assert [call.capacity for call in calls] == [Capacity(256, 256, 256)] * 2
    assert peer_call("splash", PREFILL, "tpu7x", "0.0.52").capacity is None


def _ours(microseconds: float, around_us: float = 0.0):
    result = types.SimpleNamespace(microseconds=microseconds)
    return types.SimpleNamespace(
        case=PREFILL,
        result=result,
        around_us=around_us,
        bound_us=50.0,
    )


def _theirs(microseconds: float):
    return types.SimpleNamespace(microseconds=microseconds)


def test_the_table_has_times_ratios_and_reasons():
    row = Row(
        _ours(100.0),  # pyright: ignore[reportArgumentType]
        {"rpa_v3": _theirs(150.0), "splash": "no cache"},  # pyright: ignore[reportArgumentType]
    )
    lines = [*compare.table([row], ["rpa_v3", "splash"])]
    assert lines[2] == (
        f"| {PREFILL.name} | 50.0 | 100.0 (0.50) | 150.0 (0.33; 1.50) | - |"
    )
    assert lines[-1] == f"- splash, {PREFILL.name}: no cache"
    assert row.ratio("splash") is None


def test_what_is_around_our_kernel_is_beside_its_time():
    row = Row(_ours(100.0, 25.0), {"rpa_v3": _theirs(150.0)})  # pyright: ignore[reportArgumentType]
    assert (
        "| 100.0 + 25.0 (0.50) | 150.0 (0.33; 1.50) |"
        in [*compare.table([row], ["rpa_v3"])][2]
    )


@pytest.fixture
def predicted(monkeypatch):
    """Ours takes 100 us, a peer 300 us by its own blocks and 200 us by others."""

    def predict_call(call, directory, python):
        if call.peer == "flywheel":
            raise RuntimeError("Traceback\nNotImplementedError: not that")
        return _theirs(200.0 if call.blocks else 300.0)

    monkeypatch.setattr(compare, "predict_call", predict_call)
    monkeypatch.setattr(compare, "predict", lambda case, chip, program: _ours(100.0))
    monkeypatch.setattr(compare.compiler, "compile_program", lambda shape, chip: None)


def test_the_faster_blocks_of_a_peer_count_and_a_refusal_is_told(predicted, capsys):
    arguments = ["--case", PREFILL.name, "--peers", "rpa_v3", "flywheel"]
    assert compare.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| 200.0 (0.25; 2.00) | - |" in printed
    assert f"- flywheel, {PREFILL.name}: not that" in printed


def test_a_wrong_case_is_named(predicted, capsys):
    assert compare.main(["--case", "nothing"]) == 2
    assert "'nothing'" in capsys.readouterr().err


def test_where_the_table_goes_is_checked_first(predicted, capsys, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- compared main tpu7x -->")
    with pytest.raises(SystemExit):
        compare.main(["--update", str(page)])
    assert "2 lines <!-- compared peers tpu7x -->, got 0" in capsys.readouterr().err


def test_a_directory_that_cannot_be_written_is_told(predicted, monkeypatch, capsys):
    def predict_call(call, directory, python):
        raise PermissionError(13, "Permission denied", "/cache")

    monkeypatch.setattr(compare, "predict_call", predict_call)
    assert compare.main(["--case", PREFILL.name, "--peers", "rpa_v3"]) == 0
    assert "Permission denied: '/cache'" in capsys.readouterr().out


def test_older_releases_are_compared_only_when_asked_for():
    assert compare.parse_arguments([]).peers == ["rpa_v3", "flywheel", "splash"]


def test_the_plot_has_a_bar_for_each_ratio(predicted, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "ratios.png"
    arguments = ["--case", PREFILL.name, "--peers", "rpa_v3", "--plot", str(path)]
    assert compare.main(arguments) == 0
    assert path.read_bytes().startswith(b"\x89PNG")

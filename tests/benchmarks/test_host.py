"""Host cost: the report, and one compilation for all lengths."""

import json
import random

import pytest

from benchmarks import host
from tests.conftest import HAS_TPU


def test_random_steps_fit_their_static_shape():
    generator = random.Random(1)
    seen = set()
    for _ in range(500):
        lengths = host.random_lengths(generator)
        kv_lens, starts, distribution = host.metadata_rows(lengths)
        assert len(kv_lens) == host.NUM_SEQUENCES
        assert len(starts) == host.NUM_SEQUENCES + 1
        assert starts == sorted(starts) and starts[-1] <= host.MAX_TOKENS
        assert max(kv_lens) <= host.PAGES * host.PAGE_SIZE
        assert distribution[0] == distribution[1] <= distribution[2] == len(lengths)
        for index, (q_len, kv_len) in enumerate(lengths):
            assert 0 < q_len <= kv_len
            assert (q_len == 1) == (index < distribution[0])
        seen.add(tuple(lengths))
    assert len(seen) > 400


@pytest.mark.skipif(HAS_TPU, reason="measures the XLA CPU device")
@pytest.mark.slow
@pytest.mark.parametrize("mode", host.MODES)
def test_changing_lengths_compile_once(mode, tmp_path, capsys):
    pytest.importorskip("torch_xla")
    path = tmp_path / "host.json"
    page = tmp_path / "page.md"
    page.write_text(f"before\n{host.MARK}\nold\n{host.MARK}\nafter\n")
    arguments = ["--steps", "5", "--layers", "2", "--mode", mode, "--json", str(path)]
    assert host.main([*arguments, "--update", str(page)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# cost of a call on the host, MEASURED\n# chip ")
    content = json.loads(path.read_text())
    assert {"commit", "jax", "torch_xla"} <= set(content["environment"])
    (row,) = content["rows"]
    assert row["compilations"] == 1
    assert 0 < row["call_per_layer"]["median_us"] < row["whole_step"]["median_us"]
    lines = page.read_text().splitlines()
    assert "old" not in lines and (lines[0], lines[-1]) == ("before", "after")
    assert any("5 steps of 2 calls. MEASURED." in line for line in lines)
    assert sum(line.startswith(f"| {mode} |") for line in lines) == 1

"""What a call costs the host under TorchTPU, within generous limits."""

import json

import pytest

from benchmarks import host
from tests.support import compile_only_tpu

REASON = compile_only_tpu.reason_to_skip()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.slow,
]


def test_a_call_costs_less_than_through_jax_op(tmp_path):
    path = tmp_path / "host.json"
    ways = ("operator", "compiled", "through jax_op")
    arguments = ["--steps", "60", "--rounds", "6", "--compile-only", "v6e"]
    assert host.main([*arguments, "--way", *ways, "--json", str(path)]) == 0
    rows = {row["way"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == sorted(ways)
    for row in rows.values():
        assert row["compilations"] == [1, 0]
    least = {way: row["call"]["least_us"] for way, row in rows.items()}
    # Measured: more than 2 and more than 7 times less.
    assert least["operator"] < least["through jax_op"] / 1.3
    assert least["compiled"] < least["through jax_op"] / 3

"""The bridge against torch_xla's own ways to call JAX: the same kernel, as it was."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("torch_xla")

import torch_xla.runtime as xla_runtime

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        xla_runtime.device_type() != "CPU",
        reason="a second process cannot have the TPU",
    ),
]


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    """What each way makes of one call; see ``call_jax_cases``."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.torch_rpa.call_jax_cases"],
        capture_output=True,
        text=True,
        env=os.environ | {"PJRT_DEVICE": "CPU"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def custom_call(hlo: str) -> str:
    """The only custom call of a module, without the names of its operands."""
    (line,) = re.findall(r".*= (\(.*custom_call_target=\"tpu_custom_call\".*)", hlo)
    line = re.sub(r" %[\w.\-]+", "", line)
    return re.sub(r'op_name="jit\(\w+\)/', 'op_name="', line)


def field(call: str, name: str) -> str:
    """What a field of a custom call begins with; nothing if it is not there."""
    found = re.search(name + r"=(\{\{.*?\}\)\}|\{.*?\})", call)
    return found[1] if found else ""


def test_call_jax_makes_the_same_custom_call_with_the_same_aliases(made):
    ours, theirs = (custom_call(made[name]) for name in ("bridge", "call_jax"))
    assert field(ours, "output_to_operand_aliasing") == "{{1}: (7, {})}"
    assert ours == theirs  # operands, layouts, aliases and the kernel, byte for byte
    assert made["bridge"].count(" reshape(") == made["call_jax"].count(" reshape(") == 4


def test_call_jax_serves_only_where_jax_has_a_tpu(made):
    """And with flax, which torchax imports and torch_xla does not ask for."""
    assert made["call_jax without flax"] in (None, "Jax is required for this feature")
    assert "CPU backend" in made["call_jax without a TPU"]


def test_make_kernel_from_pallas_drops_aliases_and_what_is_around_the_kernel(made):
    hlo = made["make_kernel_from_pallas"]
    ours, theirs = custom_call(made["bridge"]), custom_call(hlo)
    assert field(theirs, "backend_config") == field(ours, "backend_config")
    assert field(theirs, "output_to_operand_aliasing") == ""
    assert " reshape(" not in hlo
    # The kernel takes lengths first; it would be given the tensors of the function.
    assert field(ours, "operand_layout_constraints").startswith("{s32[5]")
    assert field(theirs, "operand_layout_constraints").startswith("{f32[24,4,128]")

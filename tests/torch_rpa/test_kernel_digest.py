"""The digest of the kernel: the same everywhere, another one when programs change."""

import re
import subprocess
import sys
from pathlib import Path

import jax_kernels
from jax_kernels import tuned
from tests.torch_tpu.tuned_record import tuned_record
from torch_rpa.bridges.kernel_digest import SWITCHES, kernel_digest

PACKAGE = Path(jax_kernels.__file__).parent


def test_it_is_a_name_of_fixed_length():
    assert re.fullmatch(r"[0-9a-f]{16}", kernel_digest())
    assert kernel_digest() == kernel_digest()


def test_it_is_the_same_in_every_process():
    code = "from torch_rpa.bridges.kernel_digest import kernel_digest as d"
    command = [sys.executable, "-W", "ignore", "-c", f"{code}; print(d('v6e', 1))"]
    printed = subprocess.run(
        command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == kernel_digest("v6e", 1)


def test_chips_records_and_switches_are_told_apart(monkeypatch):
    digests = [kernel_digest(), kernel_digest("v6e"), kernel_digest("tpu7x")]
    with tuned.applied([tuned_record()]):
        digests.append(kernel_digest())
    monkeypatch.setenv("RPA_BOUNDS_CHECKS", "1")
    digests.append(kernel_digest())
    assert len(set(digests)) == len(digests)


def test_every_environment_variable_of_the_kernel_is_a_switch():
    """``jax_kernels/tuned.py`` reads one more, whose records are in the digest."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if "os.environ" in source and path.name != "tuned.py":
            names |= set(re.findall(r'"([A-Z]+(?:_[A-Z]+)+)"', source))
    assert names == set(SWITCHES)

"""The digest of the kernel: the same everywhere, another one when programs change."""

import os
import re
import shutil
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
    assert _in_another_process(PACKAGE.parent, "v6e", 1) == kernel_digest("v6e", 1)


def _in_another_process(directory: Path, *others) -> str:
    """The digest that the packages of a directory give."""
    code = "from torch_rpa.bridges.kernel_digest import kernel_digest"
    code += f"; print(kernel_digest(*{others!r}))"
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=directory,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    return printed.stdout.strip()


def test_chips_records_and_switches_are_told_apart(monkeypatch):
    digests = [kernel_digest(), kernel_digest("v6e"), kernel_digest("tpu7x")]
    with tuned.applied([tuned_record()]):
        digests.append(kernel_digest())
    monkeypatch.setenv("RPA_BOUNDS_CHECKS", "1")
    digests.append(kernel_digest())
    assert len(set(digests)) == len(digests)


def test_the_source_of_the_operator_is_in_it(tmp_path):
    for package in ("jax_kernels", "torch_rpa"):
        shutil.copytree(PACKAGE.parent / package, tmp_path / package)

    def digest():
        return _in_another_process(tmp_path)

    assert digest() == kernel_digest()
    for name in ("ops.py", "options.py", "bridges/lowering.py"):
        before = digest()
        with (tmp_path / "torch_rpa" / name).open("a") as file:
            file.write("# changed\n")
        assert digest() != before, name


def test_every_environment_variable_of_the_kernel_is_a_switch():
    """``jax_kernels/tuned.py`` reads one more, whose records are in the digest."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if "os.environ" in source and path.name != "tuned.py":
            names |= set(re.findall(r'"([A-Z]+(?:_[A-Z]+)+)"', source))
    assert names == set(SWITCHES)

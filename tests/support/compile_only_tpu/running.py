"""Runs Python in a child process that has a compile-only TPU."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping

from jax_kernels import chips
from tests.support.compile_only_tpu.building import build

_ROOT = pathlib.Path(__file__).parents[3]


def environment(chip: str, dump_dir: pathlib.Path | str) -> dict[str, str]:
    """The variables that give a process a compile-only TPU.

    Args:
      chip: A key of ``chips.COMPILED``. The process has one chip of it.
      dump_dir: A directory for the record of one process, which is made if need be.
        torch's caches on disk are in there too: without one of its own, the process
        could find programs of former ones.
    """
    dump_dir = pathlib.Path(dump_dir).absolute()
    dump_dir.mkdir(parents=True, exist_ok=True)
    libtpu = importlib.util.find_spec("libtpu")
    assert libtpu is not None and libtpu.origin is not None
    return chips.COMPILE_ONLY_ENVIRONMENT | {
        "COMPILE_ONLY_TPU_LIBTPU": str(
            pathlib.Path(libtpu.origin).parent / "libtpu.so"
        ),
        "COMPILE_ONLY_TPU_TOPOLOGY": f"{chips.COMPILED[chip].name}:1x1x1",
        "COMPILE_ONLY_TPU_DUMP": str(dump_dir),
        "TPU_LIBRARY_PATH": str(build()),
        "TORCHINDUCTOR_CACHE_DIR": str(dump_dir / "torch_cache"),
        "JAX_PLATFORMS": "cpu",
    }


def open_tpu() -> None:
    """Registers the device ``tpu``, in a process that ``environment`` describes.

    TorchTPU registers it by itself where the PCI bus shows a TPU. It offers no public
    way to ask for it.
    """
    from torch_tpu import _loader  # pyright: ignore

    _loader._init_device("tpu")


def run(
    chip: str,
    dump_dir: pathlib.Path | str,
    *arguments: str,
    variables: Mapping[str, str] | None = None,
    check: bool = True,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Runs Python with a compile-only TPU.

    Args:
      chip: A key of ``chips.COMPILED``.
      dump_dir: Where the record goes; see :func:`environment`.
      *arguments: As Python takes them: ``"-c", code`` or ``"-m", module, ...`` or
        ``script, ...``. The device is registered before that code begins.
      variables: More environment variables.
      check: Whether to raise if the child fails.
      timeout: In seconds.

    Raises:
      RuntimeError: The child failed; with what it printed.
    """
    completed = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_only_tpu", *arguments],
        cwd=_ROOT,
        env=os.environ | environment(chip, dump_dir) | dict(variables or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and completed.returncode != 0:
        raise RuntimeError(
            f"exit status {completed.returncode}:\n{completed.stdout}\n"
            f"{completed.stderr}"
        )
    return completed

"""Compiles a kernel for TPU7x and keeps what the instrument reads of its dump."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks import compiler
from benchmarks.tpu_timing import overlays

# What the instrument reads.
_READ = (
    "post-ra",
    "packed-bundles-post-ra",
    "final_bundles",
    "pre-delay_hlo-static-per-bundle-utilization",
)
_CHILD = "RPA_RECORDING"


def main(
    module: str,
    kernels: dict[str, tuple[Callable, tuple[Any, ...]]],
    parts: tuple[str, ...] = _READ,
) -> None:
    """Writes the files of kernels into the folder of the module that defines them.

    libtpu reads its flags when it is loaded, so the module runs a second time, in a
    process of its own.

    Args:
      module: Its name, for ``python -m``.
      kernels: A function with one ``pallas_call``, and its arguments as shapes, by the
        name of the kernel.
      parts: Of the dump, to be kept beside the log of overlays.
    """
    if _CHILD in os.environ:
        for function, arguments in kernels.values():
            _compile(function, arguments)
        return
    folder = Path(__file__).parent / module.split(".")[-2]
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(
            [sys.executable, "-m", module],
            env=compiler.dumping_environment(directory) | {_CHILD: "1"},
            check=True,
        )
        for old in folder.glob("*.txt"):
            old.unlink()
        for name in kernels:
            for path in Path(directory).glob(f"*-{name}.1-*.txt"):
                label = path.name.split(f"-{name}.1-")[1]
                if label.split("-", 1)[1].removesuffix(".txt") in parts:
                    (folder / f"1-{name}.1-{label}").write_bytes(path.read_bytes())
        overlays.keep_log(Path(directory))
        log = (Path(directory) / overlays.LOG_NAME).read_text()
        (folder / overlays.LOG_NAME).write_text(log)


def _compile(function: Callable, arguments: tuple[Any, ...]) -> None:
    device = topologies.get_topology_desc(
        platform="tpu", topology_name="tpu7x:2x2x1"
    ).devices[0]
    where = SingleDeviceSharding(device)
    placed = [
        jax.ShapeDtypeStruct(argument.shape, argument.dtype, sharding=where)
        for argument in arguments
    ]
    with jax.default_device(device):
        jax.jit(function).lower(*placed).compile()

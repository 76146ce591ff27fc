"""Compiles the kernel for a chip that is not there and keeps the compiler's schedule.

libtpu reads ``LIBTPU_INIT_ARGS`` when it is loaded, so each compilation is a process of
its own: ``python -m benchmarks.compile_here``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks import cases, environment, surroundings
from benchmarks.tpu_timing import Program, code_size, load_kernel, overlays
from jax_kernels import chips

KERNEL_NAME = "rpa"
# An extreme candidate of the tuner may keep the compiler busy for ever.
MAX_SECONDS = 900
# Of the cache in the program: its schedule is the same for any number of pages, and the
# compiler refuses a cache that exceeds the HBM of the chip.
MAX_PAGES = 1024
# The files of one kernel that the instrument reads. All the others go.
KEPT = ("packed-bundles-post-ra", "final_bundles", "post-ra", "static-per-bundle-util")


@functools.lru_cache(maxsize=1)
def compile_program(
    shape: cases.StaticShape, chip: str, blocks: tuple[int, int, int] | None = None
) -> Program:
    """Compiles the kernel with libtpu; takes from ten seconds to a minute.

    The last program is kept, for a second look at the same case.

    Args:
      shape: What is compiled.
      chip: For which chip.
      blocks: ``decode_block_kv``, ``block_q`` and ``block_kv``; the defaults if None.

    Raises:
      RuntimeError: The compiler failed; its last words are in the message. Or it took
        more than ``MAX_SECONDS``.
    """
    with tempfile.TemporaryDirectory(prefix="rpa-schedule-") as directory:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.compile_here", chip],
                cwd=environment.ROOT,
                env=dumping_environment(directory),
                input=json.dumps(
                    {"shape": dataclasses.asdict(shape), "blocks": blocks}
                ),
                capture_output=True,
                text=True,
                timeout=MAX_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(
                f"compiling for {chip} took more than {MAX_SECONDS} seconds"
            ) from error
        if done.returncode:
            raise RuntimeError(
                f"compiling for {chip} failed with exit status {done.returncode}:\n"
                + "\n".join(done.stderr.splitlines()[-15:])
            )
        prune(Path(directory))
        program = dataclasses.replace(
            load_kernel(directory, KERNEL_NAME, chips.COMPILED[chip]),
            bytes_around=surroundings.bytes_around(done.stdout),
        )
    warn_of_loops(program, shape)
    return program


def warn_of_loops(program: Program, shape: cases.StaticShape) -> None:
    """Says on standard error which loops do not fit instruction memory."""
    for loop in code_size.find_oversize_loops(program):
        print(f"warning: {shape.model}, {shape.q_dtype}: {loop}", file=sys.stderr)


def dumping_environment(directory: str | Path) -> dict[str, str]:
    """Of a process that compiles for a chip that is not there.

    Args:
      directory: Where libtpu writes its files.
    """
    flags = (
        f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true "
        # All passes would be 300 MB and more, and half of the time.
        f"--xla_jf_dump_llo_pass_label_regex={'|'.join(KEPT)}"
    )
    return os.environ | {
        "LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip(),
        "JAX_PLATFORMS": "cpu",
        # A program taken from a cache would leave no schedule.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        **chips.COMPILE_ONLY_ENVIRONMENT,
        **overlays.log_environment(directory),
    }


def prune(directory: Path, kernels: Iterable[str] = (KERNEL_NAME,)) -> None:
    """Removes what the instrument does not read of the files that libtpu wrote.

    The process that compiled must have ended, since its log is complete only then.

    Args:
      directory: Where they are.
      kernels: Names of the kernels whose files are kept.
    """
    overlays.keep_log(directory)
    kernels = tuple(kernels)
    for path in directory.iterdir():
        is_kept = any(kernel in path.name for kernel in kernels) and any(
            part in path.name for part in KEPT
        )
        if path.is_dir():
            shutil.rmtree(path)
        elif not is_kept and path.name != overlays.LOG_NAME:
            path.unlink()

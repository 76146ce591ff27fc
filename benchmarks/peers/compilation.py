"""Compiles calls of other kernels, each in the environment of its peer.

What a peer's script writes is kept: the compiler's files of a program, and of each call
of it the values that reach scalar memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import compiler
from benchmarks.peers import environments
from benchmarks.peers.calls import PEERS, PeerCall

# Some programs of some releases of libtpu take more than ten minutes.
MAX_SECONDS = 3600


@dataclasses.dataclass(frozen=True)
class CompiledCall:
    """A call whose dump is there.

    Attributes:
      call: What was compiled.
      dump: Folder of the compiler's files.
      kernels: Names, in the order of execution.
      operands: Values of the operands in scalar memory, by index, of each kernel.
      versions: Of packages.
    """

    call: PeerCall
    dump: Path
    kernels: tuple[str, ...]
    operands: tuple[dict[int, np.ndarray], ...]
    versions: dict[str, str]


def compile_call(
    call: PeerCall,
    directory: str | Path | None = None,
    python: str | None = None,
) -> CompiledCall:
    """Compiles a call in its peer's environment; takes from seconds to many minutes.

    What it writes is kept, so a second time costs nothing, and another call of the same
    program a few seconds.

    Args:
      call: What to compile.
      directory: Where dumps are kept, and in it the environment, which is made if it is
        not there; ``environments.default_directory()`` if None.
      python: The Python that makes the environment, see ``environments.make``.

    Raises:
      ValueError: There is no Python that the peer needs.
      RuntimeError: Installation or compilation failed, or the latter took more than
        ``MAX_SECONDS``.
      OSError: The directory cannot be written to.
    """
    home = Path(directory or environments.default_directory())
    request = call.request()
    environment = environments.ENVIRONMENTS[call.peer]
    pins = environment.pins(call.libtpu)
    program_request = {
        key: value
        for key, value in request.items()
        if key != "sequences" or not PEERS[call.peer].has_traced_lengths
    }
    program = home / "programs" / f"{call.peer}-{_digest([program_request, pins])}"
    dump, folder = program / "dump", program / _digest(request["sequences"])
    if not (folder / "call.json").exists():
        with_peer = environments.make(
            call.peer, call.libtpu, home / "environments", python
        )
        with environments.held(program):
            is_new = not any(program.glob("*/call.json"))
            _run_script(call, {**request, "compile": is_new}, dump, folder, with_peer)
    written = json.loads((folder / "call.json").read_text())
    kernels = tuple(written["kernels"])
    with np.load(folder / "operands.npz") as arrays:
        operands = tuple(
            {
                int(key.rpartition(":")[2]): arrays[key]
                for key in arrays.files
                if key.rpartition(":")[0] == kernel
            }
            for kernel in kernels
        )
    return CompiledCall(call, dump, kernels, operands, written["versions"])


def _run_script(
    call: PeerCall, request: dict, dump: Path, folder: Path, python: Path
) -> None:
    peer = PEERS[call.peer]
    folder.mkdir(parents=True, exist_ok=True)
    if request["compile"]:  # perhaps the remains of one that was cut off
        shutil.rmtree(dump, ignore_errors=True)
        dump.mkdir()
    try:
        done = subprocess.run(
            [str(python), str(peer.script), str(folder)],
            env=compiler.dumping_environment(dump),
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=MAX_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"compiling {call.peer} for {call.chip} took more than {MAX_SECONDS} "
            "seconds"
        ) from error
    if done.returncode:
        raise RuntimeError(
            f"compiling {call.peer} for {call.chip} failed with exit status "
            f"{done.returncode}:\n" + "\n".join(done.stderr.splitlines()[-15:])
        )
    if request["compile"]:
        written = json.loads((folder / "call.json").read_text())
        compiler.prune(dump, written["kernels"])


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]

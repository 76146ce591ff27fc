"""The environments of the peers: a Python each, with their published packages.

A peer needs other releases than this project, so it is installed beside it and never
imported here. All that decides what is compiled is pinned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

PYTHON = (3, 12)  # the oldest that the pinned releases take
# Tried in this order, if none is named.
_PYTHONS = ("python3.12", "python3.13")
_PINS = "pins.json"
_INSTALL_SECONDS = 1800


@dataclasses.dataclass(frozen=True)
class Environment:
    """Packages of a peer.

    Attributes:
      name: Of the peer.
      packages: Requirements with their dependencies; JAX among them.
      alone: Requirements without their dependencies, which the kernel does not need.
      libtpu: The release of the compiler, unless another is asked for.
    """

    name: str
    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()
    libtpu: str = "0.0.52"

    def pins(self, libtpu: str | None = None) -> list[str]:
        """All requirements, that of libtpu last."""
        return [*self.packages, *self.alone, f"libtpu=={libtpu or self.libtpu}"]


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        # The releases 0.26 to 0.31 have one and the same kernel, which is the one that
        # published times are of. 0.31.0 asks for the JAX and libtpu they were taken
        # with. Its dependencies are a whole server.
        Environment(
            "rpa_v3",
            ("jax==0.11.0", "jaxlib==0.11.0"),
            alone=("tpu-inference==0.31.0",),
            libtpu="0.0.44",
        ),
        # Published times are of libtpu 0.0.44, which takes a quarter of an hour for a
        # program of FlyWheel, where 0.0.52 takes some minutes.
        Environment(
            "flywheel", ("jax==0.11.0", "jaxlib==0.11.0", "flywheel-tpu==0.3.0")
        ),
        # Its forward kernel is that of tokamax at 84e5f36, but for dropout.
        Environment("splash", ("jax==0.11.0", "jaxlib==0.11.0", "tokamax==0.0.15")),
        # The release of the day after the microbenchmarks of tokamax, with the JAX and
        # libtpu of those days. Its dependencies are for other kernels.
        Environment(
            "splash_0_0_5",
            ("jax==0.8.0", "jaxlib==0.8.0"),
            alone=("tokamax==0.0.5",),
            libtpu="0.0.30",
        ),
    )
}


def default_directory() -> Path:
    """Where environments and compiled calls are kept: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "torch-rpa" / "peers"


def make(
    name: str,
    libtpu: str | None = None,
    directory: str | Path | None = None,
    python: str | None = None,
) -> Path:
    """The Python of a peer's environment, which is made if it is not there.

    Args:
      name: One of ``ENVIRONMENTS``.
      libtpu: Release of libtpu; that of the environment if None.
      directory: Where environments are; ``default_directory()`` if None.
      python: The Python that makes it, 3.12 or newer; one is looked for if None.

    Returns:
      The path of its Python.

    Raises:
      ValueError: No such environment, or no such Python.
      RuntimeError: An installation failed; the last words of pip are in the message.
      OSError: The directory cannot be written to.
    """
    if name not in ENVIRONMENTS:
        raise ValueError(f"name: expected one of {sorted(ENVIRONMENTS)}, got {name!r}")
    environment = ENVIRONMENTS[name]
    pins = environment.pins(libtpu)
    place = Path(directory or default_directory()) / "-".join([name, pins[-1]])
    made = place / "bin" / "python"
    if _is_whole(place, pins):
        return made
    base = find_python(python)
    with held(place):
        if _is_whole(place, pins):  # made by another process meanwhile
            return made
        shutil.rmtree(place, ignore_errors=True)
        _run([base, "-m", "venv", str(place)])
        alone = set(environment.alone)
        _install(made, [pin for pin in pins if pin not in alone])
        if alone:
            _install(made, ["--no-deps", *environment.alone])
        # Last, so that an installation that was cut off is not taken for a whole one.
        (place / _PINS).write_text(json.dumps(pins))
    return made


@contextlib.contextmanager
def held(place: Path) -> Iterator[None]:
    """Within it no other process holds the same place, which need not be there yet.

    Raises:
      OSError: The directory of the place cannot be written to.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def find_python(named: str | None = None) -> str:
    """A Python that the peers' releases take.

    Args:
      named: The only one to consider, a path or a command.

    Raises:
      ValueError: It does not run or is too old, or none was found.
    """
    candidates = (named,) if named else (sys.executable, *_PYTHONS)
    found = {candidate: _version(candidate) for candidate in candidates}
    for candidate, version in found.items():
        if version is not None and version >= PYTHON:
            return candidate
    wanted = ".".join(map(str, PYTHON))
    seen = ", ".join(
        f"{candidate} ({_shown(version)})" for candidate, version in found.items()
    )
    raise ValueError(
        f"python: expected Python {wanted} or newer, which the peers' releases need, "
        f"got {seen}; name one by its path"
    )


def _version(python: str) -> tuple[int, int] | None:
    """Major and minor number, or None if it does not run."""
    if python == sys.executable:
        return sys.version_info[:2]
    try:
        done = subprocess.run(
            [python, "-c", "import sys; print(*sys.version_info[:2])"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    major, minor = map(int, done.stdout.split())
    return major, minor


def _shown(version: tuple[int, int] | None) -> str:
    return ".".join(map(str, version)) if version else "does not run"


def _is_whole(place: Path, pins: list[str]) -> bool:
    try:
        installed = json.loads((place / _PINS).read_text())
    except (OSError, ValueError):
        return False
    return installed == pins and (place / "bin" / "python").exists()


def _install(python: Path, requirements: Iterable[str]) -> None:
    _run([str(python), "-m", "pip", "install", "--quiet", *requirements])


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_INSTALL_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"{' '.join(command)} took more than {_INSTALL_SECONDS} seconds"
        ) from error
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed with exit status {done.returncode}:\n"
            + "\n".join(done.stderr.splitlines()[-15:])
        )

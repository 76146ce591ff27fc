"""Builds the plug-in, once for each version of its sources."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import tempfile

_SOURCES = pathlib.Path(__file__).parent
_FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC")


def compiler() -> str | None:
    """The C++ compiler, or None where there is none."""
    candidates = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    found = (shutil.which(candidate) for candidate in candidates if candidate)
    return next(filter(None, found), None)


def reason_to_skip() -> str | None:
    """Why there is no compile-only TPU here, or None where there is one."""
    for package in ("torch_tpu", "libtpu", "jax"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if compiler() is None:
        return "there is no C++ compiler"
    return None


@functools.cache
def build() -> pathlib.Path:
    """Returns the plug-in's shared library, and builds it where there is none yet.

    Processes that build it at the same time do not disturb each other: each one moves a
    complete library into place.

    Raises:
      RuntimeError: There is no compiler, or it fails; with what it says.
    """
    digest = hashlib.sha256(" ".join((str(compiler()), *_FLAGS)).encode())
    for source in sorted([*_SOURCES.glob("*.cc"), *_SOURCES.glob("*.h")]):
        digest.update(source.read_bytes())
    folder = pathlib.Path(tempfile.gettempdir()) / f"compile-only-tpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"plugin-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as building:
        built = pathlib.Path(building) / library.name
        compile_library([_SOURCES / "plugin.cc"], built, "-ldl")
        built.rename(library)
    return library


def compile_library(
    sources: list[pathlib.Path], library: pathlib.Path, *flags: str
) -> None:
    """Compiles C++ into a shared library.

    Raises:
      RuntimeError: There is no compiler, or it fails; with what it says.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("compile-only TPU: expected a C++ compiler, got none")
    completed = subprocess.run(
        [cxx, *_FLAGS, "-o", str(library), *map(str, sources), *flags],
        capture_output=True,
        text=True,
    )
    if completed.returncode != 0:
        raise RuntimeError(f"compile-only TPU: {cxx} failed:\n{completed.stderr}")

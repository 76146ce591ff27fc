"""A name for the kernel as it would be compiled now: equal names, equal programs.

Frameworks keep compiled programs on disk and find them by what they see of a call: the
operator, shapes and options. What the operator computes with is out of their sight. So
after an update of this package, or of JAX, or on another chip, they would run the
program of before. The digest covers what they do not see.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
from pathlib import Path

import jax_kernels
from jax_kernels import tuned

LENGTH = 16  # hexadecimal digits: 64 bits
SUFFIXES = (".py", ".json")
COMPILERS = ("jax", "jaxlib", "libtpu")
SWITCHES = ("RPA_BOUNDS_CHECKS",)  # environment variables that the kernel reads


def kernel_digest(*others: object) -> str:
    """Returns the digest of all that a program of the kernel follows from.

    That is the source of ``jax_kernels``, of the operator and of the bridges, the block
    sizes that come with it, the tuned records in force, the switches in the
    environment, and the versions of JAX and of the compiler. Shapes and options of a
    call are not in it.

    Args:
        others: What else it shall cover, such as the chip: values whose ``repr`` is the
            same in every process.
    """
    switches = [os.environ.get(name) for name in SWITCHES]
    parts = (_sources_digest(), _versions(), tuned.token(), switches, others)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:LENGTH]


@functools.cache
def _sources_digest() -> str:
    """Of the files that programs are made by, and of their paths."""
    bridges = Path(__file__).parent
    digest = hashlib.sha256()
    for root, pattern in (
        (Path(jax_kernels.__file__).parent, "**/*"),
        (bridges, "**/*"),
        (bridges.parent, "*"),  # what stands between a graph and the bridges
    ):
        for path in sorted(p for p in root.glob(pattern) if p.suffix in SUFFIXES):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@functools.cache
def _versions() -> tuple[str | None, ...]:
    return tuple(_version(package) for package in COMPILERS)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

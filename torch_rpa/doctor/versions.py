"""What fits what: releases that go together, and the known conflicts with their remedy.

The ranges are those of ``pyproject.toml``, which a test compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch_rpa.bridges import BRIDGES, Entry
from torch_rpa.doctor.checks import Check, failed, ok, skipped, warning
from torch_rpa.doctor.installation import Installation

Release = tuple[int, ...]

PYTHON = ((3, 11), (3, 13))
# What the bridges are run with, and what the kernel alone runs with beside it.
JAX = (0, 10, 2)
JAX_RANGE = ((0, 10, 2), (0, 12))
OLD_JAX = (0, 7, 1)
TRANSFORMERS = ((4, 57), (5,))

INSTALL = "pip install '.[{extra}]' in a checkout, or 'torch-rpa[{extra}]'"


def release(version: str) -> Release:
    """Returns the numbers of a version: ``(2, 13, 0)`` for ``"2.13.0+cpu"``."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    if found is None:
        raise ValueError(f"version must begin with a number, got {version!r}")
    return tuple(int(number) for number in found.group().split("."))


def is_within(version: str, first: Release, last: Release) -> bool:
    """Whether a version is in a range; ``last`` includes all that begin with it."""
    numbers = release(version)
    return first <= numbers and numbers[: len(last)] <= last


def text_of(numbers: Release) -> str:
    return ".".join(map(str, numbers))


def checks(installation: Installation) -> Iterator[Check]:
    """Yields what is to be said of each package."""
    yield python_check(installation)
    yield framework_check(installation)
    yield jax_check(installation)
    yield libtpu_check(installation)
    yield transformers_check(installation)


def usable_entry(installation: Installation) -> Entry | None:
    """Returns the entry whose framework fits the installed torch, or None."""
    for entry in BRIDGES.values():
        is_installed = entry.framework in installation.versions
        if is_installed and _fits_torch(entry, installation):
            return entry
    return None


def _fits_torch(entry: Entry, installation: Installation) -> bool:
    if entry.torch_releases is None:
        return True
    return is_within(installation.versions.get("torch", "0"), *entry.torch_releases)


def python_check(installation: Installation) -> Check:
    name, python = "python", installation.python
    first, last = map(text_of, PYTHON)
    if is_within(python, *PYTHON):
        return ok(name, f"{python}, within {first} to {last}")
    return failed(
        name,
        f"{python} is not within {first} to {last}",
        "python3.11 -m venv .venv, and install there; uv venv --seed --python 3.11 "
        ".venv brings that Python where the system has none",
    )


def framework_check(installation: Installation) -> Check:
    """Which framework brings PyTorch to the TPU, and whether torch fits it."""
    name, versions = "framework", installation.versions
    torch = versions.get("torch", "unknown")
    found = [e for e in BRIDGES.values() if e.framework in versions]
    if not found:
        names = " or ".join(entry.framework for entry in BRIDGES.values())
        extras = " or ".join(entry.extra for entry in BRIDGES.values())
        finding = f"torch {torch} without {names}: CPU tensors only"
        remedy = INSTALL.format(extra="EXTRA,tpu") + f", with {extras} as EXTRA"
        if installation.has_tpu:
            return failed(name, finding, remedy)
        return warning(name, finding, remedy)
    named = ", ".join(f"{e.framework} {versions[e.framework]}" for e in found)
    usable = usable_entry(installation)
    if usable is None:
        (entry, *_) = found
        assert entry.torch_releases is not None
        first, last = map(text_of, entry.torch_releases)
        return failed(
            name,
            f"torch {torch} does not fit {named}, which needs {first} to {last}",
            INSTALL.format(extra=entry.extra) + ", in an environment of its own",
        )
    if len(found) > 1:
        other = next(e.framework for e in found if e is not usable)
        return warning(
            name,
            f"{named} beside torch {torch}, which fits {usable.framework} only",
            f"an environment holds one framework: pip uninstall {other}",
        )
    wanted = usable.release
    if wanted and not is_within(versions[usable.framework], wanted, wanted):
        return warning(
            name,
            f"{named} was never tried, but {text_of(wanted)}",
            INSTALL.format(extra=usable.extra),
        )
    return ok(name, f"{named} with torch {torch}, which fits")


def jax_check(installation: Installation) -> Check:
    """Whether the kernel runs with this JAX, and whether jaxlib is of its release."""
    name, versions = "jax", installation.versions
    jax, jaxlib = versions.get("jax"), versions.get("jaxlib")
    wanted = text_of(JAX)
    remedy = f"pip install jax=={wanted} jaxlib=={wanted}"
    if jax is None or jaxlib is None:
        return failed(name, f"jax {jax}, jaxlib {jaxlib}: both are needed", remedy)
    if release(jax) != release(jaxlib):
        return failed(name, f"jax {jax} with jaxlib {jaxlib}: not one release", remedy)
    is_old = release(jax)[:3] == OLD_JAX
    if not is_old and not is_within(jax, *JAX_RANGE):
        return failed(
            name,
            f"{jax}: the kernel runs with {text_of(OLD_JAX)}, and with "
            f"{text_of(JAX_RANGE[0])} to {text_of(JAX_RANGE[1])}",
            remedy,
        )
    entry = usable_entry(installation)
    if entry is not None and not is_old and release(jax)[:3] != JAX:
        return warning(
            name,
            f"{jax} was tried without a framework, not with {entry.framework}",
            remedy,
        )
    return ok(name, f"{jax}, jaxlib {jaxlib}")


def libtpu_check(installation: Installation) -> Check:
    """Whether libtpu reads what this JAX writes, and is the one that is loaded."""
    name, versions = "libtpu", installation.versions
    libtpu = versions.get("libtpu")
    first, last = _libtpu_releases(installation)
    remedy = f"pip install 'libtpu>={text_of(first)},<={text_of(last)}'"
    if "libtpu-nightly" in versions:
        return failed(
            name,
            f"libtpu-nightly {versions['libtpu-nightly']} has the files of libtpu "
            f"{libtpu}: the one that was installed last is loaded",
            f"pip uninstall libtpu-nightly libtpu, then {remedy}",
        )
    if libtpu is None:
        if installation.has_tpu:
            return failed(name, "not installed; a TPU needs it", remedy)
        return skipped(name, "not installed; only a TPU needs it")
    if "TPU_LIBRARY_PATH" in installation.variables:
        return warning(
            name,
            f"TPU_LIBRARY_PATH names another one than the installed {libtpu}",
            "unset TPU_LIBRARY_PATH",
        )
    if release(libtpu) < first:
        return _old_libtpu_check(installation, libtpu, remedy)
    jax = versions.get("jax", "0")
    if release(jax)[:3] == OLD_JAX:
        return warning(
            name,
            f"{libtpu} with jax {jax} was never tried",
            f"pip install jax=={text_of(JAX)} jaxlib=={text_of(JAX)}",
        )
    if not is_within(libtpu, first, last):
        return warning(
            name, f"{libtpu} is newer than {text_of(last)}, the last one tried", remedy
        )
    return ok(name, f"{libtpu}, which reads what jax {jax} writes")


def _libtpu_releases(installation: Installation) -> tuple[Release, Release]:
    """The first and the last libtpu that fit what is installed."""
    entry = usable_entry(installation)
    ranges = [e.libtpu_releases for e in ([entry] if entry else BRIDGES.values())]
    known = [found for found in ranges if found is not None]
    return min(first for first, _ in known), max(last for _, last in known)


def _old_libtpu_check(installation: Installation, libtpu: str, remedy: str) -> Check:
    """What is said of a libtpu that is older than those that fit the present JAX."""
    name, jax = "libtpu", installation.versions.get("jax", "0")
    entry = usable_entry(installation)
    own_pair = None if entry is None else entry.own_pair
    if entry is not None and own_pair == (release(jax)[:3], release(libtpu)):
        return warning(
            name,
            f"{libtpu} with jax {jax}, the pair that {entry.framework} asks for: this "
            "kernel compiles for v5e and v6e, not for TPU7x, and other kernels do not",
            f"{remedy} 'jax=={text_of(JAX)}' 'jaxlib=={text_of(JAX)}'",
        )
    finding = f"{libtpu} cannot read the kernels that jax {jax} writes"
    if entry is not None and own_pair is not None and release(libtpu) == own_pair[1]:
        finding = f"{finding}; it came with the extra tpu of {entry.framework}"
    return failed(name, finding, remedy)


def transformers_check(installation: Installation) -> Check:
    name, version = "transformers", installation.versions.get("transformers")
    first, last = TRANSFORMERS
    wanted = f"{text_of(first)} to {text_of(last)}.x"
    remedy = "pip install 'transformers>=4.57,<6'"
    if version is None:
        return skipped(
            name, "not installed; only models and serving need it", f"{remedy} tqdm"
        )
    if is_within(version, first, last):
        return ok(name, f"{version}, within {wanted}")
    return failed(name, f"{version} is not within {wanted}", remedy)

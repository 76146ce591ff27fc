"""What a figure depends on beside the code: chip, versions, commit."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "jaxlib", "libtpu", "torch", "torch_xla", "torch_tpu", "torch-rpa")


def describe(chip: str) -> dict[str, str]:
    """Names and versions, to be printed first and written to JSON."""
    versions = {name: _version(name) for name in PACKAGES}
    python = ".".join(map(str, sys.version_info[:3]))
    return {"chip": chip, "commit": _commit(), "python": python, **versions}


def print_header(title: str, environment: dict[str, str]) -> None:
    print(f"# {title}")
    print("# " + ", ".join(f"{key} {value}" for key, value in environment.items()))


def versions_line(described: dict[str, str]) -> str:
    """What is written above a table of a document: ``figures`` says of what kind."""
    names = ("chip", "commit", "jax", "libtpu")
    versions = ", ".join(f"{name} {described[name]}" for name in names)
    return f"{versions}. All figures are {described['figures']}."


def write_json(path: str, content: dict) -> None:
    """Writes a file, or prints to standard output if the path is "-"."""
    text = json.dumps(content, indent=1) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text)


def update_markdown(path: str, mark: str, lines: list[str]) -> None:
    """Replaces what is between the two lines of a file that are the mark.

    Raises:
      ValueError: The file has not two.
    """
    parts = _split_markdown(path, mark)
    parts[1] = "\n\n" + "\n".join(lines) + "\n\n"
    Path(path).write_text(mark.join(parts))


def check_markdown(path: str, mark: str) -> None:
    """Checks that ``update_markdown`` will find its place, before what takes long.

    Raises:
      ValueError: There is no such file, or it has not two lines that are the mark.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: expected a file with 2 lines {mark}, got none")
    _split_markdown(path, mark)


def _split_markdown(path: str, mark: str) -> list[str]:
    parts = Path(path).read_text().split(mark)
    if len(parts) != 3:
        raise ValueError(f"{path}: expected 2 lines {mark}, got {len(parts) - 1}")
    return parts


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "from the checkout" if name == "torch-rpa" else "not installed"


def _commit() -> str:
    """The commit of the checkout, with a plus sign if its kernels have changes."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", "jax_kernels", "torch_rpa")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

"""Results of a long run, one JSON line each, so that an interrupted run continues."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from pathlib import Path

from benchmarks import environment


def fingerprint(*more: Path) -> dict[str, str]:
    """What results depend on: the kernel's and the instrument's sources, the compiler.

    Args:
      *more: Other files. Data files beside the sources are among them only here.
    """
    digest = hashlib.sha256()
    folders = (
        environment.ROOT / name for name in ("jax_kernels", "benchmarks/tpu_timing")
    )
    sources = (path for folder in folders for path in sorted(folder.rglob("*.py")))
    for path in itertools.chain(sources, more):
        digest.update(path.read_bytes())
    described = environment.describe("")
    versions = {name: described[name] for name in ("jax", "libtpu")}
    return {"kernel": digest.hexdigest()[:16], **versions}


class Journal:
    """A file of records that is only ever appended to.

    The first line says what the results depend on. A last line that an interruption
    cut short is dropped.

    Attributes:
      records: By key, those of earlier runs included.
    """

    def __init__(self, path: str | Path, depends_on: dict[str, str]):
        """Opens or begins a journal.

        Raises:
          ValueError: The file holds results that depend on something else.
        """
        self._path = Path(path)
        self._lock = threading.Lock()
        self.records: dict[str, dict] = {}
        lines = self._whole_lines()
        if not lines:
            self._path.write_text(json.dumps({"depends_on": depends_on}) + "\n")
            return
        found = lines[0].get("depends_on")
        if found != depends_on:
            raise ValueError(
                f"{path}: expected results of {depends_on}, got results of {found}; "
                "name another file or remove this one"
            )
        self.records = {line["key"]: line["record"] for line in lines[1:]}

    def append(self, key: str, record: dict) -> None:
        """Writes a record at once. Threads may share a journal."""
        with self._lock:
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key, "record": record}) + "\n")
            self.records[key] = record

    def _whole_lines(self) -> list[dict]:
        if not self._path.exists():
            return []
        text = self._path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._path.write_text(whole)
        return [json.loads(line) for line in whole.splitlines()]

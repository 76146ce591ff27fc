"""The code that pages print, with what is said of it in the comment before it.

``<!-- NAME example -->`` stands before code that runs as it is printed, alone or after
other examples. ``<!-- fragment: NAMES -->`` stands before code that runs where these
names are given. ``<!-- NAME command -->`` stands before a command of the README.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS_OF_OTHERS = {".venv", ".venv-torchtpu", "build", "dist", "_build"}
_FENCED = re.compile(
    r"(?:^ *<!-- (?P<marker>[^>]*?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclasses.dataclass(frozen=True)
class Snippet:
    """One fenced block of a page.

    Attributes:
        document: Path from the root.
        language: What stands behind the fence.
        marker: The comment before it, on one line; None without one.
        code: What is in it.
    """

    document: str
    language: str
    marker: str | None
    code: str

    @property
    def given(self) -> tuple[str, ...] | None:
        """The names that a fragment wants; None for anything else."""
        kind, _, names = (self.marker or "").partition(":")
        return tuple(names.replace(",", " ").split()) if kind == "fragment" else None

    def __str__(self) -> str:
        first = self.code.strip().partition("\n")[0]
        return f"{self.document}: {self.marker or first}"


def documents() -> list[Path]:
    """The pages in Markdown."""
    return sorted(
        path
        for path in ROOT.rglob("*.md")
        if not FOLDERS_OF_OTHERS & set(path.relative_to(ROOT).parts)
        and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    )


def snippets_of(path: Path) -> list[Snippet]:
    """All fenced blocks of a page."""
    document = path.relative_to(ROOT).as_posix()
    return [
        Snippet(
            document,
            match["language"],
            match["marker"] and " ".join(match["marker"].split()),
            textwrap.dedent(match["code"]),
        )
        for match in _FENCED.finditer(path.read_text("utf-8"))
    ]


def all_snippets(*languages: str) -> list[Snippet]:
    """Those of all pages that are in one of some languages."""
    return [
        snippet
        for path in documents()
        for snippet in snippets_of(path)
        if snippet.language in languages
    ]

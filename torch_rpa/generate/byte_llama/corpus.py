"""The text that ships with every Python: pydoc's topics, docstrings, the licence."""

from __future__ import annotations

import ast
import codecs
import pydoc_data.topics
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# One document in so many, by the hash of its name, is held out of training.
HELD_OUT_SHARE = 20
# Shorter paragraphs may repeat, such as the line of a class between two docstrings.
SHORTEST_UNIQUE_PARAGRAPH = 80
SKIPPED_DIRECTORIES = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
)
# Typographic signs take three bytes and say no more than these.
PLAIN = str.maketrans(
    {
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{HORIZONTAL ELLIPSIS}": "...",
        "\N{EN DASH}": "-",
        "\N{EM DASH}": "--",
        "\N{NO-BREAK SPACE}": " ",
    }
)

_Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Document(NamedTuple):
    """A text and a name that stays the same from one Python version to the next."""

    name: str
    text: str


class Split(NamedTuple):
    """The documents to train on, and others that training never sees."""

    training: list[Document]
    held_out: list[Document]


def load_split() -> Split:
    """Returns the documents of the running Python, none with a paragraph twice.

    A paragraph that occurs in training does not occur in what is held out.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    documents = [*topics(), *licence(stdlib), zen(stdlib), *modules(stdlib)]
    training = [document for document in documents if not is_held_out(document.name)]
    held_out = [document for document in documents if is_held_out(document.name)]
    seen: set[str] = set()
    return Split(
        list(_without_repetitions(training, seen)),
        list(_without_repetitions(held_out, seen)),
    )


def is_held_out(name: str) -> bool:
    """Whether a document stays out of training; depends on its name alone."""
    return zlib.crc32(name.encode("utf-8")) % HELD_OUT_SHARE == 0


def topics() -> Iterator[Document]:
    """Yields what ``help("with")`` and the like print: parts of the reference."""
    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield Document(f"topic {name}", text)


def licence(stdlib: Path) -> Iterator[Document]:
    """Yields Python's licence, which not every distribution keeps there."""
    path = stdlib / "LICENSE.txt"
    if path.exists():
        yield Document("licence", path.read_text(encoding="utf-8"))


def zen(stdlib: Path) -> Document:
    """Returns what ``import this`` prints, without printing it."""
    (cipher,) = (
        node.value.value
        for node in ast.parse((stdlib / "this.py").read_bytes()).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    )
    return Document("zen", codecs.decode(str(cipher), "rot13"))


def modules(stdlib: Path) -> Iterator[Document]:
    """Yields the documentation of each module of the standard library."""
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if SKIPPED_DIRECTORIES.isdisjoint(relative.parts):
            text = outline(ast.parse(path.read_bytes()))
            if text:
                yield Document(f"module {relative.as_posix()}", text)


def outline(module: ast.Module) -> str:
    """Returns the docstrings of a module below what they document.

    ::

        \"\"\"Heap queues.\"\"\"

        def heappush(heap, item):
            \"\"\"Push item onto heap.\"\"\"
    """
    parts = [f'"""{docstring}"""'] if (docstring := ast.get_docstring(module)) else []
    parts += _outline(module, indent="")
    return "\n\n".join(parts)


def _outline(parent: ast.Module | _Documented, indent: str) -> Iterator[str]:
    for node in parent.body:
        if not isinstance(node, _Documented):
            continue
        inner = indent + "    "
        if docstring := ast.get_docstring(node):
            lines = [_header(node), *f'    """{docstring}"""'.splitlines()]
            lines[2:] = [line and f"    {line}" for line in lines[2:]]
            yield "\n".join(line and indent + line for line in lines)
        if isinstance(node, ast.ClassDef):
            yield from _outline(node, inner)


def _header(node: _Documented) -> str:
    """The first line of a definition, as Python itself would write it."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {node.name}({ast.unparse(node.args)}){returns}:"


def _without_repetitions(
    documents: Iterable[Document], seen: set[str]
) -> Iterator[Document]:
    """Drops paragraphs that were seen before, and what is empty without them."""
    for name, text in documents:
        kept = []
        for paragraph in text.translate(PLAIN).strip().split("\n\n"):
            if paragraph not in seen:
                kept.append(paragraph)
            if len(paragraph) >= SHORTEST_UNIQUE_PARAGRAPH:
                seen.add(paragraph)
        if kept:
            yield Document(name, "\n\n".join(kept) + "\n")

"""Which text is taken, how it is cut in two, and what it looks like."""

import ast
import contextlib
import io
import sysconfig
from pathlib import Path

import pytest

from torch_rpa.generate.byte_llama import corpus

STDLIB = Path(sysconfig.get_path("stdlib"))


def test_the_outline_has_docstrings_below_what_they_document():
    source = '''
"""A module.

With two paragraphs.
"""

import sys

class Heap(list, metaclass=Meta):
    """A heap."""

    x = 1

    async def push(self, item, *, key: str = "a") -> None:
        """Push.

        Such as::

            push(1)
        """
        return None

    def undocumented(self):
        def inner():
            """Not seen from outside."""

class Bare:
    class Inner:
        """In a class without a docstring."""

def top():
    """Top."""
'''
    assert (
        corpus.outline(ast.parse(source))
        == '''"""A module.

With two paragraphs."""

class Heap(list):
    """A heap."""

    async def push(self, item, *, key: str='a') -> None:
        """Push.

        Such as::

            push(1)"""

    class Inner:
        """In a class without a docstring."""

def top():
    """Top."""'''
    )


@pytest.mark.parametrize("source", ["", "x = 1", "def f(): pass"])
def test_a_module_without_docstrings_has_no_outline(source):
    assert corpus.outline(ast.parse(source)) == ""


def test_the_zen_is_what_import_this_prints():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        import this  # noqa: F401
    assert printed.getvalue() == corpus.zen(STDLIB).text + "\n"


def test_a_missing_licence_is_left_out(tmp_path):
    assert list(corpus.licence(tmp_path)) == []


def test_modules_leave_out_tests_and_installed_packages(tmp_path):
    for name in ("a.py", "b/c.py", "b/test/d.py", "site-packages/e.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Of {name}."""')
    (tmp_path / "no_docstring.py").write_text("x = 1")
    assert list(corpus.modules(tmp_path)) == [
        ("module a.py", '"""Of a.py."""'),
        ("module b/c.py", '"""Of b/c.py."""'),
    ]


def test_the_split_goes_by_name(split):
    assert all(not corpus.is_held_out(name) for name, _ in split.training)
    assert all(corpus.is_held_out(name) for name, _ in split.held_out)
    names = [name for name, _ in split.training + split.held_out]
    assert len(set(names)) == len(names)


def test_there_is_enough_of_both_and_much_more_to_train_on(split):
    training, held_out = (sum(len(text) for _, text in part) for part in split)
    assert training > 1_500_000
    assert 30_000 < held_out < training / 10


def test_no_long_paragraph_occurs_twice(split):
    paragraphs = [
        paragraph
        for _, text in split.training + split.held_out
        for paragraph in text.removesuffix("\n").split("\n\n")
        if len(paragraph) >= corpus.SHORTEST_UNIQUE_PARAGRAPH
    ]
    assert len(paragraphs) > 5_000
    assert len(set(paragraphs)) == len(paragraphs)


def test_nearly_all_of_it_is_ascii(split):
    text = "".join(text for part in split for _, text in part)
    assert sum(not character.isascii() for character in text) < len(text) / 1000

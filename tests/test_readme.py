"""What the READMEs print as runnable runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SERVING = ROOT / "torch_rpa" / "serving" / "README.md"


def block(marker: str, document: Path = README) -> str:
    """Returns the fenced block after a marker comment."""
    pattern = rf"<!-- {marker} -->\n```\w+\n(.*?)```"
    found = re.findall(pattern, document.read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == 1
    return found[0]


def run(example: str, document: Path, names: dict) -> list[str]:
    """Runs an example; returns what its comments say that it prints."""
    exec(compile(example, str(document), "exec"), names)
    return re.findall(r"print\(.*\)  # (.*)", example)


@pytest.mark.parametrize("marker", ["example", "jax example"])
def test_the_example_runs_as_printed(marker, capsys):
    expected = run(block(marker), README, {})
    assert len(expected) == 1
    assert capsys.readouterr().out.splitlines() == expected


def test_the_examples_of_serving_run_as_printed(capsys):
    names: dict = {}
    expected = run(block("serving example", SERVING), SERVING, names)
    assert len(expected) == 3
    assert capsys.readouterr().out.splitlines() == expected
    (expected_line,) = run(block("async example", SERVING), SERVING, names)
    assert capsys.readouterr().out.strip() == expected_line
    expected = run(block("features example", SERVING), SERVING, names)
    assert len(expected) == 2
    assert capsys.readouterr().out.splitlines() == expected


def test_the_commands_are_one_line_each():
    for marker, environment in (
        ("main command", ".venv"),
        ("test command", ".venv"),
        ("torchtpu test command", ".venv-torchtpu"),
    ):
        (line,) = block(marker).splitlines()
        assert line.startswith(f"python3 -m venv {environment} && ")

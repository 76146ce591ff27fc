"""What the README prints as runnable runs."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def block(marker: str) -> str:
    """Returns the fenced block after a marker comment."""
    pattern = rf"<!-- {marker} -->\n```\w+\n(.*?)```"
    found = re.findall(pattern, README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == 1
    return found[0]


def test_the_example_runs_as_printed(capsys):
    example = block("example")
    exec(compile(example, str(README), "exec"), {})
    expected = re.findall(r"print\(.*\)  # (.*)", example)
    assert capsys.readouterr().out.splitlines() == expected


def test_the_commands_are_one_line_each():
    for marker in ("main command", "test command"):
        (line,) = block(marker).splitlines()
        assert line.startswith("python3 -m venv .venv && ")

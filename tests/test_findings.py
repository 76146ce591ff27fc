"""The scripts of findings/ can be run, leave nothing behind and install fixed versions.

What they find out is not tested: they install gigabytes.
"""

import os
import pathlib
import re

import pytest

FINDINGS = pathlib.Path(__file__).parents[1] / "findings"
SCRIPTS = sorted(FINDINGS.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_stands_alone(script):
    text = script.read_text()
    assert os.access(script, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    assert "work=$(mktemp -d)\ntrap 'rm -rf \"$work\"' EXIT\n" in text
    for section in ("Versions:", "Seen:", "Expected:", "Why it matters here:"):
        assert f"\n# {section} " in text
    assert "torch_rpa" not in _code(text) and "jax_kernels" not in _code(text)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_package_is_pinned(script):
    commands = re.findall(r"pip\" install (.*)", _code(script.read_text()))
    assert commands
    packages = [
        word for command in commands for word in command.split() if word[:2] != "--"
    ]
    assert packages
    assert [name for name in packages if not re.fullmatch(r"\w+==[\d.]+", name)] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_files_that_answer_it_are_there(script):
    named = re.findall(r"\b(?:\w+/)+\w+\.(?:py|md)\b", script.read_text())
    assert [name for name in named if not (FINDINGS.parent / name).exists()] == []


def test_the_readme_lists_every_script_once():
    readme = (FINDINGS.parent / "FINDINGS.md").read_text()
    listed = re.findall(r"^- `(\w+\.sh)`: ", readme, re.M)
    assert sorted(listed) == [script.name for script in SCRIPTS]


def _code(text: str) -> str:
    """The script without its comments, each command on one line."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return "\n".join(lines).replace("\\\n", "")

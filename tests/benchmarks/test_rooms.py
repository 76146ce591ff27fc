"""Which module of the benchmarks imports which."""

import ast
import graphlib
from pathlib import Path

import pytest

from benchmarks import environment

FOLDER = environment.ROOT / "benchmarks"
# By name, such as "benchmarks.tuning.search"; a package is its __init__.
TREES = {
    ".".join(path.relative_to(FOLDER.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    ): ast.parse(path.read_text())
    for path in FOLDER.rglob("*.py")
}


def imported(tree: ast.Module) -> set[str]:
    """Modules of the benchmarks that a module imports, anywhere in its text."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # A name may be a module, or be in one.
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= members if members <= TREES.keys() else {node.module, *members}
    return found & TREES.keys()


def is_command(name: str) -> bool:
    return "if __name__ == '__main__'" in ast.unparse(TREES[name])


def test_no_module_imports_itself_by_way_of_others():
    graph = {name: imported(tree) for name, tree in TREES.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", TREES)
def test_nothing_is_imported_from_a_command(name):
    assert [other for other in imported(TREES[name]) if is_command(other)] == []


def test_every_command_is_found():
    commands = {name.removesuffix(".__main__") for name in TREES if is_command(name)}
    documented = Path(FOLDER, "README.md").read_text()
    # Those that others start.
    scripts = {name for name in commands if ".compile_" in name}
    for name in commands - scripts:
        assert f"| `python -m {name}` |" in documented
    assert len(commands - scripts) == 9

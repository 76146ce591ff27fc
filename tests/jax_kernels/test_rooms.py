"""Which room of the kernel may import which."""

import ast
from pathlib import Path

import pytest

import jax_kernels.ragged_paged_attention as package

ROOT = Path(package.__file__).parent
PREFIX = package.__name__ + "."
KERNEL = ROOT / "kernel"
# The entry runs the loops of the phases, one after the other.
ENTRY = {"entry.py", "launch.py"}


def imports_of(path: Path) -> set[str]:
    """Rooms of the package that a module imports, such as "kernel.decode.loop"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)}


def imports_room(path: Path, room: str) -> bool:
    return any(f"{name}.".startswith(f"{room}.") for name in imports_of(path))


def test_there_are_rooms():
    assert imports_room(KERNEL / "entry.py", "kernel.tiles")
    assert imports_room(KERNEL / "decode/loop.py", "kernel.decode.copies")


@pytest.mark.parametrize("loop, other", [("decode", "tiles"), ("tiles", "decode")])
def test_neither_loop_imports_the_other(loop, other):
    for path in (KERNEL / loop).glob("*.py"):
        assert not imports_room(path, f"kernel.{other}"), path


def test_what_both_loops_share_imports_neither():
    for path in KERNEL.glob("*.py"):
        if path.name not in ENTRY:
            assert not imports_room(path, "kernel.decode"), path
            assert not imports_room(path, "kernel.tiles"), path


def test_the_two_loops_have_the_same_rooms():
    """But decode has cells that prepare keys, in steps; tiles have anchored rows, and
    parts."""
    decode, tiles = (
        {path.name for path in (KERNEL / loop).glob("*.py")}
        for loop in ("decode", "tiles")
    )
    assert decode - tiles == {"blocks.py", "steps.py"}
    assert tiles - decode == {
        "float8.py",
        "masked.py",
        "parts.py",
        "recovery.py",
        "softmax_tiles.py",
        "stretch.py",
    }


@pytest.mark.parametrize("loop", ["decode", "tiles"])
def test_what_computes_does_not_copy(loop):
    for room in ("compute.py", "buffers.py"):
        assert not imports_room(KERNEL / loop / room, f"kernel.{loop}.copies")
        assert not imports_room(KERNEL / loop / room, "kernel.copies")


def test_the_kernel_knows_nothing_of_arguments_and_choices():
    above = ("api", "validation", "block_sizes", "tuned", "reference")
    for path in KERNEL.rglob("*.py"):
        assert not any(imports_room(path, room) for room in above), path


def test_rooms_do_not_import_in_circles():
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in ROOT.rglob("*.py")
        if path.name != "__init__.py"
    }
    above: list[str] = []
    below: set[str] = set()

    def visit(room: str) -> None:
        assert room not in above, " -> ".join([*above, room])
        if room in below:
            return
        above.append(room)
        names = imports_of(paths[room])
        for other in paths:
            if any(f"{name}.".startswith(f"{other}.") for name in names):
                visit(other)
        below.add(above.pop())

    for room in paths:
        visit(room)

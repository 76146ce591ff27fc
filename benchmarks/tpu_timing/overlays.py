"""Overlays: the pieces in which a program's instructions are fetched from HBM.

Instruction memory holds a part of a large program. So libtpu cuts a program into
overlays, puts a jump routine before them, and lets each overlay name another that is
fetched while it runs. It says in its log, and in no dump file, where the cuts are:

    OverlayProgram(), input program bundle count: 26652
    ControlFlow (26884 bundles):
         44 : branch to 116 (cond)
    OverlayPartitioner (regular/jumbo/hlo overlay size 21680/65056/48792, ...):
    Overlay allocation region (granules) start: 60, limit: 8192, size: 8132
    Overlay allocation table start: 38, limit: 58, records: 10
    Overlay #1, kind:1, bundles:6264, partition [0, 6220):6220, default prefetch: #2

Partitions count bundles of the whole program, which holds the bundles of every kernel
in the order of its final listing. Where a kernel begins follows from its branches.
"""

from __future__ import annotations

import bisect
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BUNDLE_BYTES = 64
GRANULE_BUNDLES = 8  # instruction memory is allocated in pieces of so many
# What libtpu has to be told, before it is loaded, to write such a log into a folder.
_LOG_ENVIRONMENT = {
    "TPU_MIN_LOG_LEVEL": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_VMODULE": "overlay=1,overlay_partitioner=2",
}
LOG_NAME = "overlays.log"
_RAW_LOGS = "tpu_driver.*.log.INFO.*"

_LINE = re.compile(r"^I\d+ \S+\s+(\d+) overlay\w*\.cc:\d+\] ?(.*)$", re.MULTILINE)
_BEGIN = re.compile(r"^OverlayProgram\(\), input program")
_BRANCH = re.compile(r"^\s*(\d+) : branch to (\d+)")
_SIZES = re.compile(r"^OverlayPartitioner \(regular/jumbo/hlo overlay size (\d+)/(\d+)")
_REGION = re.compile(
    r"^Overlay allocation region \(granules\) start: (\d+), limit: (\d+)"
)
_TABLE = re.compile(r"^Overlay allocation table .* records: (\d+)")
_OVERLAY = re.compile(
    r"^Overlay #(\d+), kind:\d+, bundles:(\d+), partition \[(\d+), (\d+)\):\d+, "
    r"default prefetch: (?:n/a|#(\d+))$"
)
_READ = (_BEGIN, _BRANCH, _SIZES, _REGION, _TABLE, _OVERLAY)


class LogError(ValueError):
    """A log of overlays that is not as this module knows it."""


@dataclass(frozen=True)
class Overlay:
    """One piece of a program.

    Attributes:
      number: As the log has it; 0 is the jump routine.
      start: First bundle of the program in it.
      end: First bundle after it.
      bundles: That are fetched: those of the program, and jumps to other overlays.
      prefetch: Number of the overlay that is fetched when this one is entered.
    """

    number: int
    start: int
    end: int
    bundles: int
    prefetch: int | None

    @property
    def granules(self) -> int:
        return -(-self.bundles // GRANULE_BUNDLES)

    @property
    def bytes(self) -> int:
        return self.granules * GRANULE_BUNDLES * BUNDLE_BYTES


@dataclass(frozen=True)
class OverlaySizes:
    """How long the overlays of a chip may be, in bundles.

    Attributes:
      regular: Of an overlay without a longer loop; three of them fit.
      jumbo: Of one with a longer loop: the whole of instruction memory but for the jump
        routine. A loop that is longer still is cut.
    """

    regular: int
    jumbo: int


@dataclass(frozen=True)
class OverlaidProgram:
    """What the log says of one program.

    Attributes:
      overlays: By number, without the jump routine.
      branches: Target of each branch, by its bundle.
      first_granule: Of instruction memory that overlays may use.
      last_granule: The first one after them.
      records: Overlays that may be there at once.
      sizes: How long overlays may be.
    """

    overlays: Mapping[int, Overlay]
    branches: Mapping[int, int]
    first_granule: int
    last_granule: int
    records: int
    sizes: OverlaySizes


@dataclass(frozen=True)
class Layout:
    """The overlays of one kernel.

    Attributes:
      program: That has the kernel.
      first_bundle: Of the program, that is the kernel's first.
      starts: First bundle of the kernel in each of its overlays, and the number of the
        overlay, in ascending order.
    """

    program: OverlaidProgram
    first_bundle: int
    starts: tuple[tuple[int, int], ...]

    def overlay_at(self, bundle: int) -> int:
        """Number of the overlay that a bundle of the kernel is in."""
        position = bisect.bisect_right(self.starts, bundle, key=lambda start: start[0])
        return self.starts[position - 1][1]


def single_overlay(num_bundles: int, sizes: OverlaySizes) -> Layout:
    """A kernel that is one overlay, as a program is that fits a regular one."""
    overlay = Overlay(1, 0, num_bundles, num_bundles, None)
    granules = sizes.jumbo // GRANULE_BUNDLES
    program = OverlaidProgram({1: overlay}, {}, 0, granules, 1, sizes)
    return Layout(program, 0, ((0, 1),))


def log_environment(directory: str | os.PathLike) -> dict[str, str]:
    """What makes libtpu write its log of overlays into a folder."""
    return {**_LOG_ENVIRONMENT, "TPU_LOG_DIR": os.fspath(directory)}


def keep_log(directory: Path) -> None:
    """Leaves one file of what the logs in a folder say of overlays."""
    kept = "".join(
        f"{match.group()}\n"
        for path in _raw_logs(directory)
        for match in _LINE.finditer(path.read_text())
        if any(pattern.match(match.group(2)) for pattern in _READ)
    )
    for path in directory.glob("tpu_driver.*"):
        path.unlink()
    if kept:
        (directory / LOG_NAME).write_text(kept)


def read_logs(directory: str | Path) -> str:
    """The text of the logs in a folder; empty if there are none."""
    directory = Path(directory)
    paths = [*directory.glob(LOG_NAME), *_raw_logs(directory)]
    return "\n".join(path.read_text() for path in paths)


def _raw_logs(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob(_RAW_LOGS) if not path.is_symlink())


def parse_log(text: str) -> list[OverlaidProgram]:
    """The programs of a log, in its order.

    Raises:
      LogError: A program lacks a line that it should have.
    """
    # Threads compile at the same time, and each writes the lines of one program.
    by_thread: dict[str, list[list[str]]] = {}
    for thread, line in _LINE.findall(text):
        programs = by_thread.setdefault(thread, [])
        if _BEGIN.match(line):
            programs.append([])
        if programs:
            programs[-1].append(line)
    return [
        _parse_program(lines) for programs in by_thread.values() for lines in programs
    ]


def _parse_program(lines: list[str]) -> OverlaidProgram:
    def found(pattern: re.Pattern[str]) -> list[tuple[str, ...]]:
        return [match.groups() for match in map(pattern.match, lines) if match]

    def only(pattern: re.Pattern[str]) -> tuple[int, ...]:
        matches = set(found(pattern))
        if len(matches) != 1:
            raise LogError(
                f"log of overlays: expected one line {pattern.pattern!r} in a program, "
                f"got {len(matches)}"
            )
        return tuple(map(int, matches.pop()))

    overlays = {}
    for number, bundles, start, end, prefetch in found(_OVERLAY):
        if int(number):
            overlays[int(number)] = Overlay(
                number=int(number),
                start=int(start),
                end=int(end),
                bundles=int(bundles),
                prefetch=int(prefetch) if prefetch else None,
            )
    if not overlays:
        raise LogError("log of overlays: expected overlays of a program, got none")
    unknown = {o.prefetch for o in overlays.values() if o.prefetch} - set(overlays)
    if unknown:
        raise LogError(f"log of overlays: expected all overlays, got no {unknown}")
    first, last = only(_REGION)
    (records,) = only(_TABLE)
    sizes = OverlaySizes(*only(_SIZES))
    branches = {int(source): int(target) for source, target in found(_BRANCH)}
    return OverlaidProgram(overlays, branches, first, last, records, sizes)


def find_kernel(
    programs: Sequence[OverlaidProgram], branches: Mapping[int, int], num_bundles: int
) -> Layout | None:
    """Where a kernel is, or None if no program has its branches.

    If a program calls it several times, the first place is meant. The compiler may try
    a program several times, and the last one counts.

    Args:
      programs: Of the log, in its order.
      branches: Target of each branch of the kernel, by its bundle in the final listing.
      num_bundles: Of the kernel.
    """
    for program in reversed(programs):
        first = _first_bundle(program, branches, num_bundles)
        if first is not None:
            return _lay_out(program, first, num_bundles)
    return None


def _first_bundle(
    program: OverlaidProgram, branches: Mapping[int, int], num_bundles: int
) -> int | None:
    if not branches:
        # Nothing tells where it is, and that matters only if there are cuts.
        return 0 if len(program.overlays) == 1 else None
    end = max(overlay.end for overlay in program.overlays.values())
    source, target = next(iter(branches.items()))
    for position, leads_to in sorted(program.branches.items()):
        first = position - source
        is_there = (
            leads_to - target == first
            and 0 <= first <= end - num_bundles
            and all(
                program.branches.get(first + source) == first + target
                for source, target in branches.items()
            )
        )
        if is_there:
            return first
    return None


def _lay_out(program: OverlaidProgram, first: int, num_bundles: int) -> Layout:
    starts = [
        (max(overlay.start - first, 0), overlay.number)
        for overlay in sorted(program.overlays.values(), key=lambda o: o.start)
        if overlay.end > first and overlay.start < first + num_bundles
    ]
    return Layout(program, first, tuple(starts))

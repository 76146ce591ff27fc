"""Compares predictions with published times of other kernels, measured on TPUs.

    python -m benchmarks.calibrate                      # all that is not on record
    python -m benchmarks.calibrate --kernel rpa_v3 --again
    python -m benchmarks.calibrate --table --update benchmarks/README.md
    python -m benchmarks.calibrate --trial --clock highest --kernel rpa_v3

Each kernel is compiled from its published package, in an environment of its own, with
the compiler of the measurement where that is stated, and executed by the instrument.
The comparisons go to ``calibration.json``, one after the other, so that a run that is
ended goes on where it was. ``--table`` compiles nothing and shows what is on record.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator

from benchmarks import accuracy, calibration, command_line, environment
from benchmarks.accuracy import Comparison
from benchmarks.peers.calls import PEERS
from benchmarks.progress import Progress
from benchmarks.published import Cell
from benchmarks.tpu_timing.scalar_memory import SimulationError
from jax_kernels import chips

MARK = "<!-- calibration -->"


def tables(comparisons: list[Comparison]) -> Iterator[str]:
    """Markdown: errors by kernel and kind, ranges and their test, each comparison."""
    yield "| comparisons | count | median error % | nine in ten within % | bias |"
    yield "|---|---|---|---|---|"
    for name, members in _groups(comparisons):
        summary = accuracy.summarize(members)
        yield (
            f"| {name} | {summary.count} | {100 * summary.median_error:.1f} "
            f"| {100 * summary.ninth_decile:.1f} | {summary.bias:.2f} |"
        )
    yield ""
    yield "| chip | kind of step | measured / predicted | comparisons |"
    yield "|---|---|---|---|"
    for chip, kind in sorted({(c.chip, c.kind) for c in comparisons}):
        expected = accuracy.expected(kind, chip, comparisons)
        yield f"| {chip} | {kind} | {expected} | {expected.count}: {expected.of} |"
    yield ""
    yield "| kernel | of its times, within the ranges of the other kernels |"
    yield "|---|---|"
    for kernel in sorted({c.kernel for c in comparisons}):
        counts = accuracy.count_within_others(kernel, comparisons)
        yield f"| {kernel} | {f'{counts[0]} of {counts[1]}' if counts else '-'} |"
    yield ""
    yield "### All comparisons"
    yield ""
    yield "| cell | clock | libtpu | predicted us | published us | ratio | held back |"
    yield "|---|---|---|---|---|---|---|"
    for c in sorted(comparisons, key=lambda c: c.cell):
        yield (
            f"| {c.cell} | {c.clock} | {c.libtpu} | {c.predicted_us:.1f} "
            f"| {c.published_us:.1f} | {c.ratio:.2f} "
            f"| {'yes' if c.held_back else ''} |"
        )


def _groups(comparisons: list[Comparison]) -> Iterator[tuple[str, list[Comparison]]]:
    """Names and members, the empty ones left out."""
    groups = {
        "all": comparisons,
        "held back": [c for c in comparisons if c.held_back],
        "not held back": [c for c in comparisons if not c.held_back],
        **{
            kernel: [c for c in comparisons if c.kernel == kernel]
            for kernel in sorted({c.kernel for c in comparisons})
        },
        **{
            f"all on {chip}": [c for c in comparisons if c.chip == chip]
            for chip in sorted({c.chip for c in comparisons})
        },
        **{
            kind: [c for c in comparisons if c.kind == kind]
            for kind in sorted({c.kind for c in comparisons})
        },
    }
    return ((name, members) for name, members in groups.items() if members)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibrate",
        description=__doc__,
        formatter_class=command_line.HelpFormatter,
    )
    parser.add_argument(
        "--kernel", nargs="+", choices=sorted(PEERS), help="by default all"
    )
    parser.add_argument(
        "--cell", nargs="+", metavar="TEXT", help="cells whose name has one of these"
    )
    parser.add_argument("--list", action="store_true", help="names of cells, no more")
    parser.add_argument("--table", action="store_true", help="what is on record")
    parser.add_argument(
        "--again",
        action="store_true",
        help="also what is on record, with the release of libtpu that is on record",
    )
    parser.add_argument(
        "--libtpu",
        metavar="RELEASE",
        help="of the compiler, by default that on record, or that of the measurement "
        "where it is stated; some older ones take an hour for a kernel",
    )
    parser.add_argument(
        "--clock",
        choices=chips.CLOCKS,
        help="of TPU7x, by default that of each measurement; only with --trial",
    )
    parser.add_argument(
        "--trial",
        action="store_true",
        help="predict all cells that are chosen, print them and leave the record alone",
    )
    command_line.add_peer_arguments(parser)
    parser.add_argument(
        "--update",
        metavar="FILE.md",
        help=f"replace the tables between the file's two lines {MARK}",
    )
    options = parser.parse_args(arguments)
    if options.clock and not options.trial:
        parser.error("--clock: expected --trial beside it")
    if options.trial and (options.update or options.table):
        parser.error("--trial: expected neither --update nor --table")
    command_line.check_update(parser, options.update, MARK)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    cells = _selected(calibration.comparable_cells(), options)
    if not cells:
        print("error: no cell has such a name; see --list", file=sys.stderr)
        return 2
    if options.list:
        print(*(cell.name for cell in cells), sep="\n")
        return 0
    try:
        accuracy.read()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    made, failed = ([], 0) if options.table else _predict(cells, options)
    known = made if options.trial else accuracy.read()
    if not known:
        print("error: there are no comparisons", file=sys.stderr)
        return 1
    lines = [*tables(known)]
    print(*lines, sep="\n")
    if options.update:
        environment.update_markdown(options.update, MARK, lines)
    return 1 if failed else 0


def _selected(cells: Iterable[Cell], options: argparse.Namespace) -> list[Cell]:
    return [
        cell
        for cell in cells
        if (not options.kernel or cell.kernel in options.kernel)
        and (not options.cell or any(text in cell.name for text in options.cell))
    ]


def _predict(
    cells: list[Cell], options: argparse.Namespace
) -> tuple[list[Comparison], int]:
    """The new comparisons, which go on record but in a trial; how many cells failed."""
    releases = {known.cell: known.libtpu for known in accuracy.read()}
    everyone = options.again or options.trial
    wanted = [cell for cell in cells if everyone or cell.name not in releases]
    made: list[Comparison] = []
    failed = 0
    progress = Progress(len(wanted))
    # Of all cells, so that the program of one does not depend on which are chosen.
    everything = calibration.comparable_cells()
    if options.libtpu:
        releases = {cell.name: options.libtpu for cell in everything}
    calls = calibration.peer_calls(everything, releases)
    for cell in wanted:
        try:
            with progress.compiling(cell.name):
                comparison = calibration.compare(
                    cell,
                    calls[cell.name],
                    options.directory,
                    options.python,
                    clock=options.clock,
                )
        except (RuntimeError, ValueError, OSError, SimulationError) as error:
            failed += 1
            print(f"{cell.name}: {error}", file=sys.stderr)
            continue
        made.append(comparison)
        if not options.trial:
            accuracy.add(comparison)
    return made, failed


if __name__ == "__main__":
    sys.exit(main())

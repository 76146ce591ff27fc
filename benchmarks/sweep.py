"""Looks for shapes that are slower than their neighbours, in predictions.

    python -m benchmarks.sweep
    python -m benchmarks.sweep --chip v6e --only 'llama*' --journal sweep.jsonl

Every case of the table "sweep" is predicted; what the kernel promises is checked:

* no cliff: along each axis (context, sequences, new tokens, page size, window) no shape
  has less than half the efficiency of the one beside it;
* no model has less than half the efficiency of another, in steps of 50 us and more;
* a sliding window costs in proportion to the window, not to the context, wherever in a
  page it begins;
* a float8 cache is never slower than a bfloat16 one, but for up to 1 us of waits for
  instructions;
* an empty phase costs less than 3 us, nearly all of them waits for instructions;
* instructions are fetched in less than 10 us, so that no loop fetches its own;
* no scalar register is spilled to HBM.

All times have the waits for instructions in them.

Exit code 1 means that a promise is not kept. With a journal, an interrupted run
continues where it was.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import fnmatch
import sys
from collections.abc import Iterator

from benchmarks import (
    cases,
    command_line,
    compiler,
    environment,
    journal,
    prediction,
    sweep_checks,
)
from benchmarks.progress import Progress
from benchmarks.sweep_checks import Point
from benchmarks.tpu_timing import Program
from jax_kernels import chips, tuned
from jax_kernels.chips import Chip


def predict_case(case: cases.Case, chip: Chip, program: Program) -> dict:
    """What a journal keeps of a prediction."""
    result = prediction.predict(case, chip, program).result
    spilled = (n for name, n in result.dma_count.items() if name.startswith("spill"))
    return {
        "microseconds": result.microseconds,
        "code_microseconds": 1e6 * chip.rates.seconds(result.code_wait_cycles),
        "spills": sum(spilled),
    }


def predict_points(
    selected: list[cases.Case], chip: Chip, known: journal.Journal | None
) -> list[Point]:
    """Predicts what the journal does not hold; cases of a shape share a program."""
    records = dict(known.records) if known else {}

    def key(case: cases.Case) -> str:
        return f"{chip.name} {case.name}"

    by_shape = cases.by_shape(case for case in selected if key(case) not in records)
    progress = Progress(len(by_shape))
    for shape, members in by_shape.items():
        with progress.compiling(cases.in_words(members)):
            program = compiler.compile_program(shape, chip.name)
        for case in members:
            with progress.executing(case.name):
                records[key(case)] = predict_case(case, chip, program)
            if known:
                known.append(key(case), records[key(case)])
    return [sweep_checks.as_point(case, chip, records[key(case)]) for case in selected]


def table(points: list[Point]) -> Iterator[str]:
    """Lines of a Markdown table: one for each program and kind of step."""
    yield "| program | sequences | steps | efficiency %, least to most |"
    yield "|---|---|---|---|"
    rows = collections.defaultdict(list)
    for point in points:
        program = point.name.partition(":")[0]
        rows[program, point.new_tokens > 1, point.sequences].append(point)
    for (program, is_prefill, sequences), members in rows.items():
        least, most = (f(p.efficiency for p in members) for f in (min, max))
        kind = "prefill" if is_prefill else "decode"
        yield (
            f"| {program} | {sequences} {kind} | {len(members)} "
            f"| {100 * least:.1f} to {100 * most:.1f} |"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep",
        description=__doc__,
        formatter_class=command_line.HelpFormatter,
    )
    parser.add_argument(
        "--chip", choices=chips.COMPILED, default="tpu7x", help="where it would run"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="names of cases, such as 'llama*'"
    )
    parser.add_argument("--journal", metavar="FILE", help="continue, and keep results")
    parser.add_argument("--json", metavar="FILE", help="write JSON")
    options = parser.parse_args(arguments)
    chip = chips.COMPILED[options.chip]
    described = prediction.describe(chip.name)
    environment.print_header("cliffs, windows, float8, empty phases", described)
    patterns = options.only or ["*"]
    selected = [
        case
        for case in cases.SWEEP
        if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)
    ]
    if not selected:
        parser.error(f"--only: expected the name of a case, got {options.only}")
    try:
        known = (
            journal.Journal(options.journal, journal.fingerprint(tuned.DATA_FILE))
            if options.journal
            else None
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    points = predict_points(selected, chip, known)
    print("\n".join(table(points)))
    found = {name: list(check(points)) for name, check in sweep_checks.CHECKS.items()}
    for name, violations in found.items():
        print(f"\n{name}: {len(violations) or 'no'} violations")
        print("".join(f"  {violation}\n" for violation in violations), end="")
    if options.json:
        content = {
            "kind": "prediction",
            "environment": described,
            "points": [dataclasses.asdict(point) for point in points],
            "violations": found,
        }
        environment.write_json(options.json, content)
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

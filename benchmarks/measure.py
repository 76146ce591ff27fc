"""Times the cases on a real TPU, through the torch operator and through JAX.

    python -m benchmarks.predict --table --json predicted.json
    python -m benchmarks.measure --table --predictions predicted.json --json times.json

Without a TPU this says so and exits with code 2. Only one library at a time may hold a
TPU, so each is timed in a process of its own.

Through JAX, a sample is one program that loops over ``--calls`` calls: host and
dispatch are paid once. Through torch, it is one torch_xla step of ``--calls`` calls, as
in a model of so many layers. Cache contents and page tables are random; every call
rewrites the same new tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys

from benchmarks import (
    case_options,
    cases,
    command_line,
    environment,
    measurement,
    timing,
)
from benchmarks.tpu_timing import workloads
from jax_kernels import chips, machine

TIME_CASE = {
    "torch": measurement.time_with_torch,
    "jax": measurement.time_with_jax,
}


def row(
    case: cases.Case, library: str, kind: str, timed: timing.Timing, predicted: dict
) -> dict:
    """One line of the result.

    Args:
      case: What was run.
      library: Through which.
      kind: Of the device.
      timed: Per call.
      predicted: Microseconds by (case, chip).
    """
    chip = chips.find_chip(kind)
    result = {
        "case": case.name,
        "library": library,
        "chip": chip.name,
        "kind": "measurement",
        **timed.as_dict(),
    }
    if chip.known_rates is not None:
        result |= workloads.utilization(timed.median, chip, case.ideal)
    expected = predicted.get((case.name, chip.name))
    if expected:
        result["ratio_to_prediction"] = 1e6 * timed.median / expected
    return result


def clock() -> str:
    """The clock that libtpu was told to hold, one of ``chips.CLOCKS``."""
    flags = os.environ.get("LIBTPU_INIT_ARGS", "").split()
    return "highest" if chips.HIGHEST_CLOCK_FLAG in flags else "default"


def read_predictions(path: str | None) -> dict[tuple[str, str], float]:
    """Microseconds by (case, chip), from the JSON of ``benchmarks.predict``.

    They are those of the clock that libtpu was told to hold, on a chip with several.
    """
    if path is None:
        return {}
    content = json.loads(pathlib.Path(path).read_text())
    if content.get("kind") != "prediction":
        raise ValueError(
            f"predictions: expected the JSON of benchmarks.predict, got {path}"
        )
    is_default = clock() == "default"
    return {
        (c["case"], c["chip"]): (is_default and c.get("default_clock_microseconds"))
        or c["microseconds"]
        for c in content["cases"]
    }


def print_rows(rows: list[dict]) -> None:
    print("| case | through | median us (deciles) | MBU % | MFU % | to prediction |")
    print("|---|---|---|---|---|---|")
    for line in rows:
        spread = f"{line['low_us']:.1f} to {line['high_us']:.1f}"
        cells = [line["case"], line["library"], f"{line['median_us']:.1f} ({spread})"]
        for name, factor in (("mbu", 100), ("mfu", 100), ("ratio_to_prediction", 1)):
            cells.append(f"{factor * line[name]:.2f}" if name in line else "")
        print("| " + " | ".join(cells) + " |")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.measure",
        description=__doc__,
        formatter_class=command_line.HelpFormatter,
    )
    case_options.add_case_arguments(parser)
    parser.add_argument("--through", choices=TIME_CASE, help="by default both")
    parser.add_argument("--warm-up", type=int, default=3, help="samples before")
    parser.add_argument("--repeats", type=int, default=20, help="samples")
    parser.add_argument("--calls", type=int, default=8, help="in each sample")
    parser.add_argument("--predictions", metavar="FILE", help="of benchmarks.predict")
    parser.add_argument("--json", metavar="FILE", help="write JSON; - prints it")
    options = parser.parse_args(arguments)
    if not machine.has_tpu():
        print(measurement.NO_TPU_MESSAGE, file=sys.stderr)
        return measurement.NO_TPU
    if sum(map(bool, (options.case, options.table, options.seqs))) != 1:
        parser.error("give exactly one of --case, --table, --seqs")
    if options.through is None:
        rows = _in_processes(arguments if arguments is not None else sys.argv[1:])
    else:
        rows = _in_this_process(options)
    names = {line["chip"] for line in rows} or {"none"}
    described = environment.describe(", ".join(sorted(names))) | {"clock": clock()}
    if options.json != "-":
        environment.print_header("time of a step, MEASURED", described)
        print_rows(rows)
    if options.json:
        content = {"kind": "measurement", "environment": described, "rows": rows}
        environment.write_json(options.json, content)
    return 0


def _in_this_process(options: argparse.Namespace) -> list[dict]:
    predicted = read_predictions(options.predictions)
    repetition = measurement.Repetition(options.warm_up, options.repeats, options.calls)
    time_case = TIME_CASE[options.through]
    rows = []
    for case in case_options.selected_cases(options):
        kind, timed = time_case(case, repetition)
        rows.append(row(case, options.through, kind, timed, predicted))
        print(f"{case.name} through {options.through} done", file=sys.stderr)
    return rows


def _in_processes(arguments: list[str]) -> list[dict]:
    """Runs this module once for each library and joins their rows."""
    rows = []
    for library in TIME_CASE:
        command = [sys.executable, "-m", "benchmarks.measure", *arguments]
        done = subprocess.run(
            [*command, "--through", library, "--json", "-"],
            cwd=environment.ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows += json.loads(done.stdout)["rows"]
    return sorted(rows, key=lambda line: line["case"])


if __name__ == "__main__":
    sys.exit(main())

"""Tunes block sizes by prediction, without a TPU, or by time where there is one.

    python -m benchmarks.tune --chips tpu7x v6e v5e --jobs 2
    python -m benchmarks.tune --custom --heads 40 --kv-heads 8 --chips v6e
    python -m benchmarks.tune --measure

Candidates are compiled and their schedules executed for the steps in
``cases.TUNING_STEPS``. A step counts by the ratio of its time to the default's, so the
score is the geometric mean over steps. Decode and prefill are tuned at once: a program
has one candidate of each. The search climbs from the default to better neighbours, half
or twice as large; ``--exhaustive`` visits all. ``--recheck`` tries only the default and
the sizes in the data file, after a change of the kernel.

A float8 cache is tuned after the bfloat16 cache of the same shape. Sizes that make a
step slower than it is with bfloat16 are taken only if all sizes do.

Every result goes to a journal at once, and an interrupted run continues. The best sizes
go to the data file that the package ships; the default stays unless it is beaten by two
percent.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import sys
from pathlib import Path

from tqdm import tqdm

from benchmarks import (
    accuracy,
    case_options,
    cases,
    command_line,
    environment,
    journal,
    measurement,
    progress,
)
from benchmarks.tuning.run import Run
from benchmarks.tuning.search import CandidateError
from jax_kernels import chips, machine, tuned
from jax_kernels.chips import Chip


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=command_line.HelpFormatter,
    )
    parser.add_argument(
        "--chips", nargs="+", choices=chips.COMPILED, help="by default all"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=cases.TUNED_MODELS,
        default=list(cases.TUNED_MODELS),
        help="with a bfloat16 and a float8 cache; by default all",
    )
    parser.add_argument(
        "--custom", action="store_true", help="the shape below in place of the models"
    )
    parser.add_argument("--jobs", type=int, default=1, help="compilations at once")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument(
        "--exhaustive",
        dest="extent",
        action="store_const",
        const="all",
        help="try every candidate",
    )
    extent.add_argument(
        "--recheck",
        dest="extent",
        action="store_const",
        const="starts",
        help="try the model's sizes and those of the data file, no others",
    )
    parser.set_defaults(extent="climb")
    parser.add_argument(
        "--measure", action="store_true", help="time on the TPU in place of predicting"
    )
    parser.add_argument(
        "--journal", metavar="FILE", default="tune.jsonl", help="continue, and keep"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        default=tuned.DATA_FILE,
        help="by default the file that the package ships",
    )
    case_options.add_model_arguments(parser.add_argument_group("shape of --custom"))
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error("--jobs: expected at least 1")
    if options.measure and (options.chips or options.jobs > 1):
        parser.error("--measure takes the chip there is, and one job")
    return options


def selected_shapes(options: argparse.Namespace) -> list[list[cases.StaticShape]]:
    """What the options ask to tune: lists of shapes to take one after the other."""
    if options.custom:
        shape = cases.tuning_shape(
            case_options.given_model(options),
            page_size=options.page_size,
            q_dtype=options.q_dtype,
            cache_dtype=options.cache_dtype,
        )
        return [[shape]]
    return [
        [
            cases.tuning_shape(cases.TUNED_MODELS[name], cache_dtype=dtype)
            for dtype in ("bfloat16", "float8_e4m3fn")
        ]
        for name in options.models
    ]


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    kind = "measurement" if options.measure else "prediction"
    names = options.chips or list(chips.COMPILED)
    if options.measure:
        if not machine.has_tpu():
            print(measurement.NO_TPU_MESSAGE, file=sys.stderr)
            return measurement.NO_TPU
        names = [_chip_there_is()]
    described = environment.describe(", ".join(names)) | {"figures": kind}
    if not options.measure:
        described["accuracy"] = "; ".join(map(accuracy.in_words, names))
    environment.print_header("block sizes", described)
    try:
        known = journal.Journal(options.journal, journal.fingerprint())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    work = [
        (shapes, chips.COMPILED[name])
        for name in names
        for shapes in selected_shapes(options)
    ]
    failures = []
    total = sum(len(shapes) for shapes, _ in work)
    # Without a terminal there is no bar, but a line for each candidate.
    with contextlib.ExitStack() as shown:
        bar = shown.enter_context(tqdm(total=total, unit="shape", disable=None))

        def tell(candidate: str) -> None:
            text = f"{len(known.records)} results, trying {candidate}"
            if bar.disable:
                print(text, file=sys.stderr, flush=True)
            else:
                bar.set_postfix_str(text)

        if not bar.disable:
            shown.enter_context(progress.every_second(bar.refresh))
        run = Run(kind, known, options.output, options.extent, tell)

        def tune_in_order(shapes: list[cases.StaticShape], chip: Chip) -> None:
            for shape in shapes:
                try:
                    lines = [_line(record) for record in run.tune_shape(shape, chip)]
                except CandidateError as error:
                    failures.append(error)
                    line = f"{chip.name}, {shape}: the default does not work: {error}"
                    lines = [line]
                bar.write("\n".join(lines))
                bar.update()

        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            jobs = [pool.submit(tune_in_order, *item) for item in work]
            for job in concurrent.futures.as_completed(jobs):
                job.result()
    return 1 if failures else 0


def _chip_there_is() -> str:
    """The name of the TPU of this machine.

    Raises:
      SystemExit: Its peaks are not known.
    """
    import jax

    kind = jax.devices()[0].device_kind
    name = chips.find_chip(kind).name
    if name not in chips.COMPILED:
        expected = ", ".join(chips.COMPILED)
        raise SystemExit(f"--measure: expected one of {expected}, got {kind}")
    return name


def _line(record: tuned.TunedBlocks) -> str:
    blocks = ", ".join(f"{name} {size}" for name, size in record.blocks.items())
    return (
        f"{record.chip} {record.phase}, {record.shape}: {blocks}, "
        f"{record.speedup:.3f} times the speed of the default"
    )


if __name__ == "__main__":
    sys.exit(main())

"""Predicts the time of a step on a TPU that is not there.

    python -m benchmarks.predict --case llama-decode-128x8k
    python -m benchmarks.predict --table main deployments
    python -m benchmarks.predict --heads 32 --kv-heads 8 --head-dim 128 \
        --cache-dtype float8_e4m3fn --seqs '64*1/2048,512/4096' --chip v6e

libtpu compiles the kernel, and the instrument in ``tpu_timing`` executes its schedule
for the given lengths. Every figure is a prediction; ``benchmarks.measure`` measures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks import (
    block_choice,
    case_options,
    cases,
    command_line,
    compiler,
    environment,
    plots,
)
from benchmarks.prediction import (
    Prediction,
    describe,
    predict,
    predict_all,
    scaled_cases,
)
from benchmarks.progress import Progress
from benchmarks.tpu_timing import DmaModel, report
from jax_kernels import chips
from jax_kernels.chips import Chip


def table(predictions: Iterable[Prediction]) -> Iterator[str]:
    """Lines of a Markdown table, as soon as each is known.

    The time at the default clock is a dash where it is not known, or the only one. What
    XLA puts around the kernel is beside its time.
    """
    yield (
        "| case | us | measured, expected us | at default clock us | MBU % | MFU % "
        "| of cap % | DMA waits % | bound us | bound / time |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for prediction in predictions:
        result, shares = prediction.result, prediction.shares
        waits = result.dma_wait_cycles / result.cycles
        slower = prediction.default_clock_us
        percentages = (
            shares["mbu"],
            shares["mfu"],
            shares["mfu"] / prediction.cap,
            waits,
        )
        yield (
            f"| {prediction.case.name} | {result.microseconds:.1f}"
            f"{_around_in_words(prediction)} "
            f"| {_expected_us(prediction)} "
            f"| {'-' if slower is None else f'{slower:.1f}'} | "
            + " | ".join(f"{100 * share:.0f}" for share in percentages)
            + f" | {prediction.bound_us:.1f} | {prediction.of_bound:.2f} |"
        )


def _expected_us(prediction: Prediction) -> str:
    """The range of measured times, with three digits."""
    expected, time = prediction.expected, prediction.result.microseconds
    return f"{_rounded(expected.low * time)} to {_rounded(expected.high * time)}"


def _rounded(microseconds: float) -> str:
    """With three significant digits, and without an exponent."""
    digits = max(0, 2 - math.floor(math.log10(microseconds)))
    if digits:
        return f"{microseconds:.{digits}f}"
    return f"{float(f'{microseconds:.3g}'):.0f}"


def _around_in_words(prediction: Prediction) -> str:
    """What is around the kernel, as a summand beside its time."""
    return f" + {prediction.around_us:.1f}" if prediction.around_us else ""


def _clock_in_words(prediction: Prediction) -> str:
    if prediction.default_clock_us is None:
        return ""
    return (
        f" At the default clock {prediction.default_clock_us:.1f} us; the highest one "
        f"needs {chips.HIGHEST_CLOCK_FLAG} in LIBTPU_INIT_ARGS."
    )


def details(prediction: Prediction) -> str:
    """The whole account of one case."""
    case, shares = prediction.case, prediction.shares
    model, shape = case.shape.model, case.shape
    choice = block_choice.explain(shape, prediction.chip.name)
    expected = prediction.expected
    window = f", window {model.sliding_window}" if model.sliding_window else ""
    return "\n".join(
        [
            f"{case.name}: {model.num_q_heads}/{model.num_kv_heads} heads of "
            f"{model.head_dim}, {shape.cache_dtype} cache, page {shape.page_size}"
            f"{window}, sequences {cases.shortened(case.lengths)}",
            f"  {block_choice.as_text(choice)}",
            f"  PREDICTED time {prediction.result.microseconds:.1f} us, "
            f"MBU {shares['mbu']:.1%}, MFU {shares['mfu']:.1%} of at most "
            f"{prediction.cap:.0%}; "
            f"bound of the chip {prediction.bound_us:.1f} us",
            f"  beside that, operations of XLA around the kernel: "
            f"{prediction.around_us:.1f} us",
            f"  a measured time is expected from {_expected_us(prediction)} us: "
            f"{expected.count} published times ({expected.of}) were {expected} times "
            f"their predictions.{_clock_in_words(prediction)}",
            report.as_text(prediction.result),
        ]
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predict",
        description=__doc__,
        formatter_class=command_line.HelpFormatter,
    )
    case_options.add_case_arguments(parser)
    defaults = DmaModel()
    parser.add_argument(
        "--chip", choices=chips.COMPILED, default="tpu7x", help="where it would run"
    )
    parser.add_argument("--list", action="store_true", help="names of cases, no more")
    parser.add_argument(
        "--scaling", action="store_true", help="also over contexts and batch sizes"
    )
    parser.add_argument("--json", metavar="FILE", help="write JSON; - prints it")
    parser.add_argument(
        "--baseline",
        metavar="FILE",
        help="put cycles into the file of the regression test; it keeps other cases "
        "if they are of the same chip and versions",
    )
    parser.add_argument(
        "--doctor",
        metavar="FILE",
        help="put times into the file that torch_rpa.doctor compares with; it keeps "
        "those of other chips and cases",
    )
    parser.add_argument(
        "--update",
        metavar="FILE.md",
        help="replace each table between the file's two lines "
        "<!-- predicted TABLE CHIP -->",
    )
    parser.add_argument("--trace", metavar="FILE", help="Perfetto/Chrome trace")
    parser.add_argument(
        "--plot", metavar="FILE.png", help="roofline and scaling; needs matplotlib"
    )
    model = parser.add_argument_group("constants of the model")
    model.add_argument(
        "--latency-us",
        type=float,
        default=defaults.latency_s * 1e6,
        help="from the issue of a copy to its flag, beside the transfer",
    )
    model.add_argument(
        "--descriptor-ns",
        type=float,
        default=defaults.descriptor_s * 1e9,
        help="time of the memory channel for each piece of a copy",
    )
    model.add_argument(
        "--efficiency",
        type=float,
        default=defaults.efficiency,
        help="share of the peak bandwidth that copies reach",
    )
    options = parser.parse_args(arguments)
    given = [bool(options.case), bool(options.table), bool(options.seqs)]
    if not options.list and sum(given) != 1:
        parser.error("give exactly one of --case, --table, --seqs (or --list)")
    if options.update and not options.table:
        parser.error("--update: expected --table")
    for name in options.table or ():
        command_line.check_update(parser, options.update, _mark(name, options.chip))
    return options


def _mark(table_name: str, chip: str) -> str:
    return f"<!-- predicted {table_name} {chip} -->"


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.list:
        for name, members in cases.TABLES.items():
            print(f"{name}:", *cases.names_in_short(members), sep="\n  ")
        return 0
    if options.plot:
        plots.require_matplotlib()
    try:
        selected = case_options.selected_cases(options)
        dma_model = DmaModel(
            latency_s=options.latency_us * 1e-6,
            descriptor_s=options.descriptor_ns * 1e-9,
            efficiency=options.efficiency,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chip = chips.COMPILED[options.chip]
    described = describe(chip.name)
    quiet = options.json == "-"
    if not quiet:
        environment.print_header("time of a step on one TensorCore", described)
    stream = predict_all(selected, chip, dma_model, both_clocks=True)
    try:
        predictions = _collect(stream, options, quiet)
        curves = _follow_up(selected[0], chip, dma_model, options, quiet)
    except RuntimeError as error:  # of the compiler, or of what the kernel refuses
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.plot:
        plots.write(options.plot, chip, predictions, curves)
    if options.update:
        by_name = {prediction.case.name: prediction for prediction in predictions}
        for name in options.table:
            members = [by_name[case.name] for case in cases.TABLES[name]]
            lines = [environment.versions_line(described), "", *table(members)]
            mark = _mark(name, options.chip)
            environment.update_markdown(options.update, mark, lines)
    if options.baseline:
        content = baseline(predictions, described, Path(options.baseline))
        environment.write_json(options.baseline, content)
    if options.doctor:
        content = doctor_record(predictions, described, Path(options.doctor))
        environment.write_json(options.doctor, content)
    if options.json:
        content = {
            "kind": "prediction",
            "environment": described,
            "dma_model": dataclasses.asdict(dma_model),
            "cases": [prediction.as_dict() for prediction in predictions],
            "scaling": [[point.as_dict() for point in curve] for curve in curves],
        }
        environment.write_json(options.json, content)
    return 1 if any(p.result.nonzero_flags for p in predictions) else 0


def baseline(
    predictions: list[Prediction], described: dict[str, str], file: Path
) -> dict:
    """What the regression test compares with; the versions decide if it can.

    Args:
      predictions: What is new.
      described: Chip and versions.
      file: The former content, whose other cases stay if chip and versions are these.
    """
    versions = {name: described[name] for name in ("chip", "jax", "libtpu")}
    former = json.loads(file.read_text()) if file.exists() else {}
    is_alike = all(former.get(name) == version for name, version in versions.items())
    known = former["cycles"] if is_alike else {}
    cycles = {p.case.name: round(p.result.cycles) for p in predictions}
    return {"kind": "prediction", **versions, "cycles": known | cycles}


def doctor_record(
    predictions: list[Prediction], described: dict[str, str], file: Path
) -> dict:
    """What ``torch_rpa.doctor`` compares measured times with.

    Args:
      predictions: What is new, all of one chip.
      described: Chip and versions.
      file: The former content, whose other chips and cases stay.
    """
    chip = described["chip"]
    known = json.loads(file.read_text())["chips"] if file.exists() else {}
    cases_of_chip = known.get(chip, {}).get("cases", {}) | {
        p.case.name: {
            "microseconds": round(p.total_us, 1),
            "default_clock_microseconds": None
            if p.default_clock_us is None
            else round(p.default_clock_us + p.around_us, 1),
            "expected": [p.expected.low, p.expected.high],
        }
        for p in predictions
    }
    versions = {name: described[name] for name in ("jax", "libtpu")}
    chips_known = known | {chip: {**versions, "cases": cases_of_chip}}
    return {"kind": "prediction", "chips": dict(sorted(chips_known.items()))}


def _collect(
    stream: Iterator[Prediction], options: argparse.Namespace, quiet: bool
) -> list[Prediction]:
    """Prints predictions as they come: a table of many, all about a few."""
    predictions: list[Prediction] = []

    def kept() -> Iterator[Prediction]:
        for prediction in stream:
            predictions.append(prediction)
            yield prediction

    lines = table(kept()) if options.table else map(details, kept())
    for line in lines:
        if not quiet:
            print(line, flush=True)
    return predictions


def _follow_up(
    case: cases.Case,
    chip: Chip,
    dma_model: DmaModel,
    options: argparse.Namespace,
    quiet: bool,
) -> list[list[Prediction]]:
    """Trace and scaling of the first case; returns the curves."""
    if not (options.trace or options.scaling or options.plot):
        return []
    progress = Progress(1)
    with progress.compiling(case.name):
        program = compiler.compile_program(case.shape, chip.name)
    if options.trace:
        traced = predict(case, chip, program, dma_model, keep_timeline=True)
        report.write_trace(options.trace, program, chip, traced.result)
    if not (options.scaling or options.plot):
        return []
    curves = []
    for name, members in zip(("context", "sequences"), scaled_cases(case), strict=True):
        with progress.executing(f"{case.name} over {name}"):
            curve = [predict(member, chip, program, dma_model) for member in members]
        curves.append(curve)
        if not quiet:
            print(f"\nPREDICTED, {case.name} over {name}:")
            print("\n".join(table(curve)))
    return curves


if __name__ == "__main__":
    sys.exit(main())

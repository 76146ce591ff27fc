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
import collections
import concurrent.futures
import dataclasses
import datetime
import functools
import itertools
import math
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm import tqdm

from benchmarks import (
    block_choice,
    cases,
    compiler,
    environment,
    journal,
    measure,
    predict,
)
from benchmarks.tpu_timing import SimulationError
from jax_kernels import chips
from jax_kernels.chips import Chip
from jax_kernels.ragged_paged_attention import block_sizes, tuned
from jax_kernels.ragged_paged_attention.config import BlockSizes

# Sizes of a candidate, by the names of BlockSizes.
SIZES = {
    "decode_block_kv": (128, 256, 512, 1024, 2048, 4096),
    "block_q": (32, 64, 128, 256, 512),
    "block_kv": (128, 256, 512, 1024, 2048),
}
# The default stays unless it takes this much longer: predictions are no better.
LEAST_GAIN = 1.02
# A step may exceed its limit so much, since two schedules of the same work differ.
LIMIT_TOLERANCE = 1.01
# Times the score where a step exceeds its limit: any other candidate is better.
EXCESS = 1000.0

Candidate = tuple[int, ...]
# Cycles by step, for each phase; raises CandidateError.
Evaluate = Callable[[BlockSizes], dict[str, dict[str, float]]]
# Cycles by phase and step.
Limits = Mapping[str, Mapping[str, float]]


class CandidateError(Exception):
    """A candidate does not fit or does not compile; others may."""


class Search:
    """Looks for the candidate with the least score in a grid.

    Attributes:
      scores: Of candidates that were tried; infinite if they do not work.
    """

    def __init__(
        self, axes: list[tuple[int, ...]], starts: list[Candidate], extent: str
    ):
        self._axes = axes
        self._starts = starts
        self._extent = extent
        self.scores: dict[Candidate, float] = {}

    @property
    def best(self) -> Candidate | None:
        """The candidate with the least score; None if none works so far."""
        working = {c: score for c, score in self.scores.items() if score < math.inf}
        return min(working, key=lambda c: working[c]) if working else None

    def following(self) -> Candidate | None:
        """The next candidate to try, or None at the end."""
        more = ()
        if self._extent == "all":
            more = itertools.product(*self._axes)
        elif self._extent == "climb" and self.best:
            more = _neighbours(self.best, self._axes)
        waiting = itertools.chain(self._starts, more)
        return next((c for c in waiting if c not in self.scores), None)


def _neighbours(candidate: Candidate, axes: list[tuple[int, ...]]):
    """One size half or twice as large."""
    for position, axis in enumerate(axes):
        for size in (candidate[position] * 2, candidate[position] // 2):
            if size in axis:
                yield (*candidate[:position], size, *candidate[position + 1 :])


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What is known of one phase at the end.

    Attributes:
      blocks: The best sizes, by name.
      default_blocks: The model's.
      cycles: Of each step with the best.
      default_cycles: Of each step with the model's.
    """

    blocks: dict[str, int]
    default_blocks: dict[str, int]
    cycles: dict[str, float]
    default_cycles: dict[str, float]


def tune(
    default: BlockSizes,
    starts: list[BlockSizes],
    fits: Callable[[BlockSizes, str], bool],
    evaluate: Evaluate,
    *,
    limits: Limits | None = None,
    extent: str = "climb",
) -> dict[str, Tuning]:
    """The best sizes of each phase.

    Args:
      default: What the model gives. It has to work.
      starts: Where the search begins besides.
      fits: Whether the part of a candidate that a phase uses fits the memory.
      evaluate: Tries one candidate.
      limits: Cycles that no step should exceed, by phase and step.
      extent: "climb", "all", or "starts" to try nothing but default and starts.

    Raises:
      CandidateError: The default does not work.
    """
    cycles: dict[str, dict[Candidate, dict[str, float]]] = collections.defaultdict(dict)
    searches: dict[str, Search] = {}
    for phase, names in tuned.PHASES.items():
        begin = [_part(blocks, phase) for blocks in (default, *starts)]
        axes = [SIZES[name] for name in names]
        searches[phase] = Search(axes, begin, extent)
        for candidate in itertools.product(*axes):
            if not fits(_joined(default, phase, candidate), phase):
                searches[phase].scores[candidate] = math.inf

    def note(blocks: BlockSizes) -> None:
        for phase, by_step in evaluate(blocks).items():
            part = _part(blocks, phase)
            cycles[phase].setdefault(part, by_step)
            score = _score(cycles[phase][part], cycles[phase][_part(default, phase)])
            limit = (limits or {}).get(phase, {})
            is_within = _keeps(limit, cycles[phase][part])
            searches[phase].scores[part] = score * (1 if is_within else EXCESS)

    note(default)
    while True:
        new = {phase: search.following() for phase, search in searches.items()}
        new = {phase: candidate for phase, candidate in new.items() if candidate}
        if not new:
            break
        together = _best(searches, default)
        for phase, candidate in new.items():
            together = _joined(together, phase, candidate)
        try:
            note(together)
        except CandidateError:
            # Each by itself, beside what is known to work.
            for phase, candidate in new.items():
                alone = _joined(_best(searches, default), phase, candidate)
                try:
                    if alone == together:
                        raise CandidateError
                    note(alone)
                except CandidateError:
                    searches[phase].scores[candidate] = math.inf
    found = {}
    for phase, search in searches.items():
        base = _part(default, phase)
        best = search.best or base
        if search.scores[best] * LEAST_GAIN > search.scores[base]:
            best = base
        blocks, default_blocks = (
            dict(zip(tuned.PHASES[phase], candidate, strict=True))
            for candidate in (best, base)
        )
        found[phase] = Tuning(
            blocks, default_blocks, cycles[phase][best], cycles[phase][base]
        )
    return found


def _part(blocks: BlockSizes, phase: str) -> Candidate:
    return tuple(getattr(blocks, name) for name in tuned.PHASES[phase])


def _joined(blocks: BlockSizes, phase: str, candidate: Candidate) -> BlockSizes:
    sizes = dict(zip(tuned.PHASES[phase], candidate, strict=True))
    return dataclasses.replace(blocks, **sizes)


def _best(searches: dict[str, Search], default: BlockSizes) -> BlockSizes:
    for phase, search in searches.items():
        if search.best:
            default = _joined(default, phase, search.best)
    return default


def _score(cycles: dict[str, float], default: dict[str, float]) -> float:
    """Geometric mean over steps of the time by the default's."""
    logs = [math.log(cycles[step] / default[step]) for step in default]
    return math.exp(sum(logs) / len(logs))


def _keeps(limit: Mapping[str, float], cycles: dict[str, float]) -> bool:
    """Whether no step takes longer than its limit, if it has one."""
    return all(
        count <= LIMIT_TOLERANCE * limit.get(step, math.inf)
        for step, count in cycles.items()
    )


def check_fits(
    shape: cases.StaticShape, chip: Chip, blocks: BlockSizes, phase: str
) -> None:
    """Raises where the buffers of one phase, or lengths and pages, do not fit.

    Raises:
      CandidateError: With the estimate.
    """
    problem, spec = block_choice.problem_of(shape)
    config = block_sizes.make_config(problem, spec, blocks, None, False)
    phases = tuple(p for p in config.phases if p.is_decode == (phase == "decode"))
    config = dataclasses.replace(config, phases=phases)
    limit = int(chip.vmem_bytes * block_sizes.VMEM_LIMIT_SHARE)
    try:
        block_sizes.check_fits(problem, config, chip, limit)
    except ValueError as error:
        raise CandidateError(str(error)) from error


def predict_blocks(
    shape: cases.StaticShape, chip: Chip, blocks: BlockSizes
) -> dict[str, dict[str, float]]:
    """Predicted cycles of each step."""
    try:
        program = compiler.compile_program(
            shape, chip.name, dataclasses.astuple(blocks)
        )
        return {
            phase: {
                step: predict.predict(
                    cases.Case(step, shape, step), chip, program
                ).result.cycles
                for step in steps
            }
            for phase, steps in cases.TUNING_STEPS.items()
        }
    except (RuntimeError, SimulationError) as error:
        raise CandidateError(str(error)) from error


def time_blocks(
    shape: cases.StaticShape, chip: Chip, blocks: BlockSizes
) -> dict[str, dict[str, float]]:
    """Measured time of each step, in cycles of the chip's clock."""
    import jax

    from jax_kernels.ragged_paged_attention import ragged_paged_attention

    attention = functools.partial(
        ragged_paged_attention, chip=chip.name, block_sizes=blocks
    )
    repetition = measure.Repetition(warm_up=2, repeats=10, calls=8)

    def cycles(step: str) -> float:
        case = cases.Case(step, shape, step)
        _, timed = measure.time_with_jax(case, repetition, attention)
        return timed.median * chip.rates.clock_hz

    try:
        return {
            phase: {step: cycles(step) for step in steps}
            for phase, steps in cases.TUNING_STEPS.items()
        }
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise CandidateError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Run:
    """Tunes shapes one by one and keeps what it learns.

    Attributes:
      kind: "prediction" or "measurement".
      known: Results of candidates.
      output: The data file.
      extent: As ``tune`` has it.
    """

    kind: str
    known: journal.Journal
    output: Path
    extent: str
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def tune_shape(
        self, shape: cases.StaticShape, chip: Chip
    ) -> list[tuned.TunedBlocks]:
        """Tunes one shape and writes what was found."""
        problem, spec = block_choice.problem_of(shape)
        model = block_sizes.preferred(problem, spec)
        default = block_sizes.fit(problem, spec, chip, model)
        with self._lock:
            written = self._written()
        shipped = block_sizes.explain(problem, spec, chip, written).blocks
        tuned_shape = block_sizes.tuned_shape(problem, spec)
        found = tune(
            default,
            [shipped],
            functools.partial(self._fits, shape, chip),
            functools.partial(self._evaluate, shape, chip),
            limits=self._limits(written, chip, tuned_shape),
            extent=self.extent,
        )
        described = environment.describe(chip.name)
        versions = {name: described[name] for name in ("commit", "jax", "libtpu")}
        date = datetime.date.today().isoformat()
        records = [
            tuned.TunedBlocks(
                chip=chip.name,
                phase=phase,
                shape=tuned_shape,
                blocks=tuning.blocks,
                default_blocks=tuning.default_blocks,
                kind=self.kind,
                cycles=_rounded(tuning.cycles),
                default_cycles=_rounded(tuning.default_cycles),
                versions={"date": date, **versions},
            )
            for phase, tuning in found.items()
        ]
        self._write(records)
        return records

    def _limits(
        self,
        written: tuple[tuned.TunedBlocks, ...],
        chip: Chip,
        shape: tuned.TunedShape,
    ) -> Limits:
        """The cycles of the same shape whose cache has the dtype of the queries."""
        if shape.cache_dtype == shape.q_dtype:
            return {}
        wide = dataclasses.replace(shape, cache_dtype=shape.q_dtype)
        return {
            record.phase: record.cycles
            for record in written
            if (record.chip, record.shape, record.kind) == (chip.name, wide, self.kind)
        }

    def _key(
        self, shape: cases.StaticShape, chip: Chip, blocks: BlockSizes, phase: str
    ) -> str:
        """Of a phase's part of a candidate in the journal."""
        sizes = "/".join(map(str, _part(blocks, phase)))
        return f"{self.kind} {chip.name} {shape} {phase} {sizes}"

    def _fits(
        self, shape: cases.StaticShape, chip: Chip, blocks: BlockSizes, phase: str
    ) -> bool:
        """Whether a phase fits; noted where not."""
        key = self._key(shape, chip, blocks, phase)
        if key in self.known.records:
            return "failure" not in self.known.records[key]
        try:
            check_fits(shape, chip, blocks, phase)
        except CandidateError as error:
            self.known.append(key, {"failure": str(error)})
            return False
        return True

    def _evaluate(
        self, shape: cases.StaticShape, chip: Chip, blocks: BlockSizes
    ) -> dict[str, dict[str, float]]:
        """The result of a candidate: known of both phases, or tried and noted."""
        keys = {phase: self._key(shape, chip, blocks, phase) for phase in tuned.PHASES}
        records = self.known.records
        if not all(key in records for key in keys.values()):
            # What fails, fails as a whole.
            together = " ".join(keys.values())
            if together in records:
                raise CandidateError(records[together]["failure"])
            try_blocks = predict_blocks if self.kind == "prediction" else time_blocks
            try:
                found = try_blocks(shape, chip, blocks)
            except CandidateError as error:
                self.known.append(together, {"failure": str(error)})
                raise
            for phase, key in keys.items():
                if key not in records:
                    self.known.append(key, {"cycles": found[phase]})
        return {phase: records[key]["cycles"] for phase, key in keys.items()}

    def _written(self) -> tuple[tuned.TunedBlocks, ...]:
        """The records of the data file."""
        return tuned.parse(self.output.read_text()) if self.output.exists() else ()

    def _write(self, records: list[tuned.TunedBlocks]) -> None:
        """Puts records into the data file, in the place of those with their keys."""
        with self._lock:
            merged = {r.key: r for r in (*self._written(), *records)}
            whole = self.output.with_suffix(".partial")
            whole.write_text(tuned.as_text(merged.values()))
            whole.replace(self.output)


def _rounded(cycles: dict[str, float]) -> dict[str, int]:
    return {step: round(count) for step, count in cycles.items()}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--chips", nargs="+", choices=chips.COMPILED, help="by default all"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=cases.MODEL_NAMES,
        default=list(cases.MODEL_NAMES),
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
    parser.add_argument("--journal", metavar="FILE", default="tune.jsonl")
    parser.add_argument("--output", metavar="FILE", type=Path, default=tuned.DATA_FILE)
    predict.add_model_arguments(parser.add_argument_group("shape of --custom"))
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
            predict.given_model(options),
            page_size=options.page_size,
            q_dtype=options.q_dtype,
            cache_dtype=options.cache_dtype,
        )
        return [[shape]]
    return [
        [
            cases.tuning_shape(cases.MODEL_NAMES[name], cache_dtype=dtype)
            for dtype in ("bfloat16", "float8_e4m3fn")
        ]
        for name in options.models
    ]


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    kind = "measurement" if options.measure else "prediction"
    names = options.chips or list(chips.COMPILED)
    if options.measure:
        if not measure.has_tpu():
            print(measure.NO_TPU_MESSAGE, file=sys.stderr)
            return measure.NO_TPU
        names = [_chip_there_is()]
    described = environment.describe(", ".join(names)) | {"figures": kind}
    environment.print_header("block sizes", described)
    try:
        known = journal.Journal(options.journal, journal.fingerprint())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run = Run(kind, known, options.output, options.extent)
    work = [
        (shapes, chips.COMPILED[name])
        for name in names
        for shapes in selected_shapes(options)
    ]
    failures = []
    total = sum(len(shapes) for shapes, _ in work)
    with tqdm(total=total, unit="shape") as bar:

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
                bar.set_postfix(candidates=len(known.records))

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

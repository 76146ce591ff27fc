"""Looks for shapes that are slower than their neighbours, in predictions.

    python -m benchmarks.sweep
    python -m benchmarks.sweep --chip v6e --only 'llama*' --journal sweep.jsonl

Every case of the table "sweep" is predicted; what the kernel promises is checked:

* no cliff: along each axis (context, sequences, new tokens, page size, window) no shape
  has less than half the efficiency of the one beside it;
* no model has less than half the efficiency of another, in steps of 50 us and more;
* a sliding window costs in proportion to the window, not to the context;
* a float8 cache is never slower than a bfloat16 one;
* an empty phase costs less than 0.3 us;
* no scalar register is spilled to HBM.

Exit code 1 means that a promise is not kept. With a journal, an interrupted run
continues where it was.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import fnmatch
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from tqdm import tqdm

from benchmarks import cases, compiler, environment, journal, predict
from benchmarks.tpu_timing import Program, workloads
from jax_kernels import chips
from jax_kernels.chips import Chip
from jax_kernels.ragged_paged_attention import tuned

CLIFF = 0.5
# Neighbours on an axis are at most this far apart; a little more than doubling.
NEIGHBOUR_RATIO = 2.05
# Models are compared where the peaks of the chip, and not latencies, decide.
LARGE_STEP_US = 50
# Time over all contexts that are longer than the window, the most by the least.
WINDOW_FLATNESS = 1.1
# Of a window at a long context, by the time of a context as long as the window and a
# page, since a window seldom begins where a page begins.
WINDOW_COST = 1.25
# Two schedules of the same work differ by about so much.
FP8_TOLERANCE = 1.01
EMPTY_PHASE_US = 0.3


@dataclasses.dataclass(frozen=True)
class Point:
    """A predicted step of ``sequences`` equal sequences.

    Attributes:
      name: Of the case.
      chip: Its name.
      model: Without its window.
      window: Its sliding window, or None.
      cache_dtype: Of the cache.
      page_size: Tokens in a page.
      chunked: Whether the program has a loop for chunks of a fixed size.
      sequences: How many.
      new_tokens: Of each sequence.
      context: Tokens of each sequence before the new ones.
      microseconds: Predicted.
      efficiency: Time at the peaks of the chip, by the predicted time.
      spills: DMAs of scalar registers.
    """

    name: str
    chip: str
    model: cases.Model
    window: int | None
    cache_dtype: str
    page_size: int
    chunked: bool
    sequences: int
    new_tokens: int
    context: int
    microseconds: float
    efficiency: float
    spills: int

    def without(self, *fields: str) -> tuple:
        """Everything but the figures and the given fields: what a comparison fixes."""
        skip = {"name", "microseconds", "efficiency", "spills", *fields}
        names = (field.name for field in dataclasses.fields(self))
        return tuple(getattr(self, name) for name in names if name not in skip)


def as_point(case: cases.Case, chip: Chip, record: dict) -> Point:
    """A point of a case and what ``predict_case`` recorded of it."""
    sequences, shape = case.sequences, case.shape
    if len(set(sequences)) > 1:
        raise ValueError(f"{case.name}: expected equal sequences, got {case.lengths}")
    first = sequences[0]
    needed = case.ideal
    cap = workloads.attention_cap(shape.model.head_dim, chip)
    least = max(
        needed.bytes / chip.rates.hbm_bytes_per_s,
        needed.flops / chip.rates.bf16_flops_per_s / cap,
    )
    return Point(
        name=case.name,
        chip=chip.name,
        model=dataclasses.replace(shape.model, sliding_window=None),
        window=shape.model.sliding_window,
        cache_dtype=shape.cache_dtype,
        page_size=shape.page_size,
        chunked=shape.chunk_prefill_size is not None,
        sequences=len(sequences),
        new_tokens=first.q_len,
        context=first.kv_len - first.q_len,
        microseconds=record["microseconds"],
        efficiency=1e6 * least / record["microseconds"],
        spills=record["spills"],
    )


def _groups(points: Iterable[Point], *free: str) -> Iterator[list[Point]]:
    """Points that differ in the free fields only, each group sorted by the first."""
    by_rest = collections.defaultdict(list)
    for point in points:
        by_rest[point.without(*free)].append(point)
    for members in by_rest.values():
        yield sorted(members, key=lambda point: getattr(point, free[0]))


def cliffs(points: list[Point]) -> Iterator[str]:
    """Neighbours of which one has less than half the efficiency of the other."""
    with_window = [point for point in points if point.window]
    for axis in ("context", "sequences", "new_tokens", "page_size", "window"):
        members = with_window if axis == "window" else points
        for group in _groups(members, axis):
            for near, far in itertools.pairwise(group):
                if _size(far, axis) > NEIGHBOUR_RATIO * _size(near, axis):
                    continue
                low, high = sorted((near, far), key=lambda p: p.efficiency)
                if low.efficiency < CLIFF * high.efficiency:
                    yield (
                        f"cliff: {low.name} has {low.efficiency:.1%} efficiency "
                        f"({low.microseconds:.1f} us), beside {high.name} with "
                        f"{high.efficiency:.1%} ({high.microseconds:.1f} us)"
                    )


def _size(point: Point, axis: str) -> int:
    """Where a point is on an axis; a context counts with the new tokens."""
    if axis == "context":
        return point.context + point.new_tokens
    return getattr(point, axis)


def models_behind(points: list[Point]) -> Iterator[str]:
    """Models with less than half the efficiency of another in the same large step."""
    large = [p for p in points if p.efficiency * p.microseconds >= LARGE_STEP_US]
    by_step = collections.defaultdict(list)
    for point in large:
        by_step[point.without("model", "window")].append(point)
    for group in by_step.values():
        best = max(group, key=lambda p: p.efficiency)
        for point in group:
            if point.efficiency < CLIFF * best.efficiency:
                yield (
                    f"model: {point.name} has {point.efficiency:.1%} efficiency "
                    f"({point.microseconds:.1f} us), {best.name} {best.efficiency:.1%}"
                )


def window_costs(points: list[Point]) -> Iterator[str]:
    """Windows whose cost depends on the context, or is not that of their own length."""
    for group in _groups([p for p in points if p.window], "context"):
        # A window that begins where a page does reads a page less than another.
        by_place = collections.defaultdict(list)
        for point in group:
            if point.context >= 2 * (point.window or 0):
                by_place[point.context % point.page_size].append(point)
        for inside in by_place.values():
            least, most = (f(inside, key=lambda p: p.microseconds) for f in (min, max))
            if most.microseconds > WINDOW_FLATNESS * least.microseconds:
                yield (
                    f"window: {most.name} takes {most.microseconds:.1f} us, "
                    f"{least.name} {least.microseconds:.1f} us"
                )
    decodes = [p for p in points if p.new_tokens == 1]
    for group in _groups(decodes, "context", "window"):
        full = [p for p in group if not p.window]
        if not full:
            continue
        contexts, times = zip(*((p.context, p.microseconds) for p in full), strict=True)
        for point in group:
            reach = (point.window or 0) + point.page_size
            if not point.window or point.context < reach:
                continue
            expected = float(np.interp(reach, contexts, times))
            if point.microseconds > WINDOW_COST * expected:
                yield (
                    f"window: {point.name} takes {point.microseconds:.1f} us, a "
                    f"context of {reach} without a window {expected:.1f} us"
                )


def slower_with_fp8(points: list[Point]) -> Iterator[str]:
    """Steps that a float8 cache makes slower."""
    for group in _groups(points, "cache_dtype"):
        by_dtype = {point.cache_dtype: point for point in group}
        wide, narrow = (by_dtype.get(t) for t in ("bfloat16", "float8_e4m3fn"))
        if wide and narrow and narrow.microseconds > FP8_TOLERANCE * wide.microseconds:
            yield (
                f"fp8: {narrow.name} takes {narrow.microseconds:.1f} us, {wide.name} "
                f"{wide.microseconds:.1f} us"
            )


def empty_phase_costs(points: list[Point]) -> Iterator[str]:
    """Steps that an empty phase more makes noticeably slower."""
    for group in _groups(points, "chunked"):
        if len(group) == 2:
            without, with_phase = group
            cost = with_phase.microseconds - without.microseconds
            if cost > EMPTY_PHASE_US:
                yield (
                    f"empty phase: {with_phase.name} takes {cost:.2f} us more than "
                    f"{without.name}"
                )


def spills(points: list[Point]) -> Iterator[str]:
    """Steps in which scalar registers go to HBM."""
    for point in points:
        if point.spills:
            yield f"spill: {point.name} moves scalar registers {point.spills} times"


CHECKS: dict[str, Callable[[list[Point]], Iterator[str]]] = {
    "no cliff": cliffs,
    "no model far behind another": models_behind,
    "a window costs in proportion to the window": window_costs,
    "float8 is never slower": slower_with_fp8,
    f"an empty phase costs less than {EMPTY_PHASE_US} us": empty_phase_costs,
    "no scalar register is spilled": spills,
}


def predict_case(case: cases.Case, chip: Chip, program: Program) -> dict:
    """What a journal keeps of a prediction."""
    result = predict.predict(case, chip, program).result
    spilled = (n for name, n in result.dma_count.items() if name.startswith("spill"))
    return {"microseconds": result.microseconds, "spills": sum(spilled)}


def predict_points(
    selected: list[cases.Case], chip: Chip, known: journal.Journal | None
) -> list[Point]:
    """Predicts what the journal does not hold; cases of a shape share a program."""
    records = dict(known.records) if known else {}

    def key(case: cases.Case) -> str:
        return f"{chip.name} {case.name}"

    by_shape = collections.defaultdict(list)
    for case in selected:
        if key(case) not in records:
            by_shape[case.shape].append(case)
    missing = sum(map(len, by_shape.values()))
    with tqdm(total=missing, unit="case", desc=chip.name) as bar:
        for shape, members in by_shape.items():
            program = compiler.compile_program(shape, chip.name)
            for case in members:
                records[key(case)] = predict_case(case, chip, program)
                if known:
                    known.append(key(case), records[key(case)])
                bar.update()
    return [as_point(case, chip, records[key(case)]) for case in selected]


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
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chip", choices=chips.COMPILED, default="tpu7x")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="names of cases, such as 'llama*'"
    )
    parser.add_argument("--journal", metavar="FILE", help="continue, and keep results")
    parser.add_argument("--json", metavar="FILE", help="write JSON")
    options = parser.parse_args(arguments)
    chip = chips.COMPILED[options.chip]
    described = environment.describe(chip.name) | {"figures": predict.PREDICTED}
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
    found = {name: list(check(points)) for name, check in CHECKS.items()}
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

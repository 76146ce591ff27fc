"""What the kernel promises of all shapes, checked on points of a sweep."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from benchmarks import cases
from benchmarks.tpu_timing import workloads
from jax_kernels.chips import Chip

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
# All of instruction memory and the latency of several fetches take so long on v5e.
CODE_US = 10


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
      microseconds: Predicted, without waits for instructions.
      code_microseconds: The waits for instructions.
      efficiency: Time at the peaks of the chip, by ``microseconds``.
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
    code_microseconds: float
    efficiency: float
    spills: int

    def without(self, *fields: str) -> tuple:
        """Everything but the figures and the given fields: what a comparison fixes."""
        figures = {"microseconds", "code_microseconds", "efficiency", "spills"}
        skip = {"name", *figures, *fields}
        names = (field.name for field in dataclasses.fields(self))
        return tuple(getattr(self, name) for name in names if name not in skip)


def as_point(case: cases.Case, chip: Chip, record: dict) -> Point:
    """A point of a case.

    Args:
      case: Of equal sequences.
      chip: For which it was predicted.
      record: Its "microseconds" and "code_microseconds", which older journals lack, and
        "spills", the number of DMAs of registers.
    """
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
        code_microseconds=record.get("code_microseconds", 0.0),
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


def code_waits(points: list[Point]) -> Iterator[str]:
    """Steps that wait for instructions more than once for each overlay."""
    for point in points:
        if point.code_microseconds > CODE_US:
            yield (
                f"instructions: {point.name} waits {point.code_microseconds:.1f} us "
                "for them"
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
    f"instructions are fetched in less than {CODE_US} us": code_waits,
    "no scalar register is spilled": spills,
}

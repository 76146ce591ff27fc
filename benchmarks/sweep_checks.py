"""What the kernel promises of all shapes, checked on points of a sweep."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from benchmarks import cases
from benchmarks.tpu_timing import DmaModel, workloads
from jax_kernels import chips
from jax_kernels.chips import Chip
from jax_kernels.contract.cache import ITEMSIZES

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
# Programs are cut into overlays in different ways, and a step may wait for a part of
# the program that it does not need: so much beside FP8_TOLERANCE, and of a phase.
FP8_CODE_US = 1.0
EMPTY_PHASE_US = 3.0
# All of instruction memory and the latency of several fetches take so long on v5e.
CODE_US = 10


@dataclasses.dataclass(frozen=True)
class Point:
    """A predicted step.

    Attributes:
      name: Of the case.
      chip: Its name.
      model: Without its window.
      window: Its sliding window, or None.
      cache_dtype: Of the cache.
      page_size: Tokens in a page.
      chunked: Whether the program has a loop for chunks of a fixed size.
      sequences: How many.
      new_tokens: Of each sequence; the most, if they differ.
      context: Tokens of each sequence before the new ones; likewise.
      mix: The lengths of sequences that differ; "" if all are alike.
      microseconds: Predicted, with waits for instructions.
      code_microseconds: The waits for instructions.
      efficiency: The bound of the chip, by ``microseconds``.
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
    mix: str
    microseconds: float
    code_microseconds: float
    efficiency: float
    spills: int

    @property
    def work_microseconds(self) -> float:
        """Without waits for instructions."""
        return self.microseconds - self.code_microseconds

    def without(self, *fields: str) -> tuple:
        """Everything but the figures and the given fields: what a comparison fixes."""
        figures = {"microseconds", "code_microseconds", "efficiency", "spills"}
        skip = {"name", *figures, *fields}
        names = (field.name for field in dataclasses.fields(self))
        return tuple(getattr(self, name) for name in names if name not in skip)


def as_point(case: cases.Case, chip: Chip, record: dict) -> Point:
    """A point of a case.

    Args:
      case: The step.
      chip: For which it was predicted.
      record: Its "microseconds", of them its "code_microseconds", and "spills", the
        number of DMAs of registers.
    """
    sequences, shape = case.sequences, case.shape
    cap = workloads.attention_cap(shape.model.head_dim, chip)
    least = workloads.bound_seconds(case.ideal, chip, cap)
    return Point(
        name=case.name,
        chip=chip.name,
        model=dataclasses.replace(shape.model, sliding_window=None),
        window=shape.model.sliding_window,
        cache_dtype=shape.cache_dtype,
        page_size=shape.page_size,
        chunked=shape.chunk_prefill_size is not None,
        sequences=len(sequences),
        new_tokens=max(s.q_len for s in sequences),
        context=max(s.kv_len - s.q_len for s in sequences),
        mix=case.lengths if len(set(sequences)) > 1 else "",
        microseconds=record["microseconds"],
        code_microseconds=record["code_microseconds"],
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
    with_window = [p for p in points if p.window and not p.mix]
    for group in _groups(with_window, "context"):
        inside = [p for p in group if p.context >= 2 * (p.window or 0)]
        if not inside:
            continue
        least = min(inside, key=lambda p: p.microseconds)
        for point in inside:
            # A window that begins inside a page may read a page more.
            pages = max(0, _window_pages(point) - _window_pages(least))
            allowed = least.microseconds + pages * _page_us(point)
            if point.microseconds > WINDOW_FLATNESS * allowed:
                yield (
                    f"window: {point.name} takes {point.microseconds:.1f} us, "
                    f"{least.name} {least.microseconds:.1f} us"
                )
    decodes = [p for p in points if p.new_tokens == 1 and not p.mix]
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


def _window_pages(point: Point) -> int:
    """Pages of a sequence that have a token in the window of some query."""
    first = point.context + 1 - (point.window or 0)
    last = point.context + point.new_tokens - 1
    return last // point.page_size - first // point.page_size + 1


def _page_us(point: Point) -> float:
    """Time of a page of each sequence at the speed of copies."""
    model = point.model
    token_bytes = 2 * model.num_kv_heads * model.head_dim * ITEMSIZES[point.cache_dtype]
    page_bytes = point.sequences * point.page_size * token_bytes
    bytes_per_s = chips.COMPILED[point.chip].rates.hbm_bytes_per_s
    return 1e6 * page_bytes / (bytes_per_s * DmaModel().efficiency)


def slower_with_fp8(points: list[Point]) -> Iterator[str]:
    """Steps that a float8 cache makes slower."""
    for group in _groups(points, "cache_dtype"):
        wides = [point for point in group if point.cache_dtype == "bfloat16"]
        if not wides:
            continue
        wide = min(wides, key=lambda p: p.microseconds)
        for narrow in group:
            is_float8 = narrow.cache_dtype == "float8_e4m3fn"
            most = FP8_TOLERANCE * wide.microseconds + FP8_CODE_US
            if is_float8 and (
                narrow.microseconds > most
                or narrow.work_microseconds > FP8_TOLERANCE * wide.work_microseconds
            ):
                yield (
                    f"fp8: {narrow.name} takes {narrow.microseconds:.1f} us, "
                    f"{wide.name} {wide.microseconds:.1f} us"
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

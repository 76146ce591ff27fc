"""Looks for the best block sizes of each phase, whatever it is that tries them."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping

from jax_kernels import tuned
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


def _neighbours(
    candidate: Candidate, axes: list[tuple[int, ...]]
) -> Iterator[Candidate]:
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
        begin = [part(blocks, phase) for blocks in (default, *starts)]
        axes = [SIZES[name] for name in names]
        searches[phase] = Search(axes, begin, extent)
        for candidate in itertools.product(*axes):
            if not fits(_joined(default, phase, candidate), phase):
                searches[phase].scores[candidate] = math.inf

    def note(blocks: BlockSizes) -> None:
        for phase, by_step in evaluate(blocks).items():
            tried = part(blocks, phase)
            found = cycles[phase].setdefault(tried, by_step)
            score = _score(found, cycles[phase][part(default, phase)])
            is_within = _keeps((limits or {}).get(phase, {}), found)
            searches[phase].scores[tried] = score * (1 if is_within else EXCESS)

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
        base = part(default, phase)
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


def part(blocks: BlockSizes, phase: str) -> Candidate:
    """The sizes that a phase uses."""
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

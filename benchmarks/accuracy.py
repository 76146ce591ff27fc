"""How far predictions were from published times: the record, and what follows from it.

``calibration.json`` has one comparison for each published cell that was predicted
(``python -m benchmarks.calibrate`` writes it). The errors of a kind of step are the
range in which a measured time is expected, and it is printed with every prediction.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks import published
from benchmarks.tpu_timing.workloads import Sequence

FILE = Path(__file__).with_name("calibration.json")

# Of the comparisons of a kind, how many lie within the range that is printed.
COVERED = 0.9
# Fewer comparisons than that say little of a kind: those of all kinds are taken. Even
# with ten, one further time in five is outside of all of them.
FEWEST = 10


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A published time and its prediction.

    Attributes:
      cell: Name of the published cell.
      kernel, chip, kind, held_back: As in ``published.Cell``.
      clock: With which the prediction was made: ``"highest"`` or ``"default"``.
      predicted_us: For all calls of the cell together.
      published_us: Likewise.
      libtpu: That compiled the kernel.
      measured_with: The libtpu of the measurement, as far as stated.
    """

    cell: str
    kernel: str
    chip: str
    kind: str
    held_back: bool
    clock: str
    predicted_us: float
    published_us: float
    libtpu: str
    measured_with: str | None

    @property
    def ratio(self) -> float:
        """Published by predicted: above 1, the prediction was too short."""
        return self.published_us / self.predicted_us

    @property
    def error(self) -> float:
        """Of the prediction, as a share of the published time."""
        return abs(self.predicted_us / self.published_us - 1)


@dataclasses.dataclass(frozen=True)
class Range:
    """Where measured times lie, as multiples of the predicted ones.

    Attributes:
      low, high: Between them are ``COVERED`` of the comparisons, rounded outwards.
      count: Of comparisons.
      of: What they are of: the kind on the chip, all kinds on it, or all on all chips.
    """

    low: float
    high: float
    count: int
    of: str

    def __str__(self) -> str:
        return f"{self.low:.2f} to {self.high:.2f}"


def read(file: Path = FILE) -> list[Comparison]:
    """The comparisons on record; none if there is no record.

    Raises:
      ValueError: The file is not as ``write`` leaves it.
    """
    if not file.exists():
        return []
    try:
        rows = json.loads(file.read_text())["comparisons"]
        return [Comparison(**row) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file.name}: expected comparisons as benchmarks.calibrate writes them, "
            f"got a file that cannot be read ({error}); take it from the repository "
            "again, or remove it"
        ) from error


def write(comparisons: Iterable[Comparison], file: Path = FILE) -> None:
    """Writes the record; the order of the comparisons does not matter.

    A write that is cut off leaves the former record.
    """
    rows = sorted(map(dataclasses.asdict, comparisons), key=lambda row: row["cell"])
    text = json.dumps({"comparisons": rows}, indent=1) + "\n"
    written = file.with_name(f"{file.name}.{os.getpid()}")
    written.write_text(text)
    written.replace(file)


def add(comparison: Comparison, file: Path = FILE) -> None:
    """Adds to the record, in the place of an older one of the same cell.

    The record is read again, since another run may have added to it meanwhile.
    """
    others = [known for known in read(file) if known.cell != comparison.cell]
    write([*others, comparison], file)


def expected(
    kind: str, chip: str, comparisons: Iterable[Comparison] | None = None
) -> Range:
    """Where the measured time of a step is expected.

    The comparisons are those of its kind on its chip, if there are ``FEWEST``; or else
    those of all kinds on it, if its own is among them; or else all there are.

    Args:
      kind: As ``kind_of`` gives it.
      chip: Its name.
      comparisons: Those on record if None.

    Raises:
      ValueError: There are no comparisons at all.
    """
    known = _recorded() if comparisons is None else tuple(comparisons)
    if not known:
        raise ValueError("comparisons: expected at least one, got none")
    on_chip = [c for c in known if c.chip == chip]
    of_kind = [c for c in on_chip if c.kind == kind]
    choices = {
        f"{kind} on {chip}": of_kind,
        # Prefill alone says nothing of decode.
        f"all on {chip}": on_chip if of_kind else [],
    }
    of, chosen = next(
        ((of, chosen) for of, chosen in choices.items() if len(chosen) >= FEWEST),
        ("all", known),
    )
    ratios = sorted(c.ratio for c in chosen)
    outside = (1 - COVERED) / 2 * (len(ratios) - 1)
    low = _quantile(ratios, outside)
    high = _quantile(ratios, len(ratios) - 1 - outside)
    return Range(_down(low), -_down(-high), len(ratios), of)


def in_words(chip: str) -> str:
    """How far predictions for a chip were from measured times, of any kind."""
    known = [c for c in _recorded() if c.chip == chip] or list(_recorded())
    if not known:
        return "nothing is known of measured times"
    summary = summarize(known)
    where = chip if known[0].chip == chip else "other chips"
    return (
        f"{summary.count} published times on {where} were {summary.bias:.2f} times "
        f"their predictions in the median, nine in ten within "
        f"{math.ceil(100 * summary.ninth_decile)} %"
    )


def kind_of(microseconds: float, sequences: Iterable[Sequence], head_dim: int) -> str:
    """The kind of a step, by the rule of ``published.Cell.kind``.

    A head dimension of which nothing is published counts as the nearest one below, or
    as the smallest.

    Args:
      microseconds: Predicted time.
      sequences: Of the step.
      head_dim: Of its keys.
    """
    kind = published.kind_of(microseconds, sequences, head_dim)
    if kind.startswith("prefill"):
        known = sorted(
            int(c.kind.partition("-")[2])
            for c in _recorded()
            if c.kind.startswith("prefill")
        )
        below = [width for width in known if width <= head_dim] or known[:1]
        return f"prefill-{below[-1]}" if below else kind
    return kind


@dataclasses.dataclass(frozen=True)
class Summary:
    """Errors of some comparisons.

    Attributes:
      count: Of them.
      median_error: Of the sizes of the errors.
      ninth_decile: Of the sizes: nine in ten are not larger.
      bias: Median of published by predicted.
    """

    count: int
    median_error: float
    ninth_decile: float
    bias: float


def summarize(comparisons: Iterable[Comparison]) -> Summary:
    """Errors of comparisons, of which there must be at least one."""
    known = list(comparisons)
    errors = sorted(c.error for c in known)
    return Summary(
        len(errors),
        statistics.median(errors),
        errors[-(-9 * len(errors) // 10) - 1],
        statistics.median(c.ratio for c in known),
    )


def count_within_others(
    kernel: str, comparisons: Iterable[Comparison]
) -> tuple[int, int] | None:
    """How well ranges hold for a kernel that had no part in them, as ours has none.

    Args:
      kernel: One of those compared.
      comparisons: Of it and of others.

    Returns:
      How many of its times are in the ranges that the other kernels alone give, and how
      many it has; None if there are no other kernels.
    """
    known = list(comparisons)
    others = [c for c in known if c.kernel != kernel]
    if not others:
        return None
    own = [
        (c.ratio, expected(c.kind, c.chip, others)) for c in known if c.kernel == kernel
    ]
    return sum(r.low <= ratio <= r.high for ratio, r in own), len(own)


@functools.lru_cache(maxsize=1)
def _recorded() -> tuple[Comparison, ...]:
    return tuple(read(FILE))


def _quantile(ordered: list[float], position: float) -> float:
    """Between two of the ordered values, in proportion."""
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def _down(value: float) -> float:
    """Rounded down to hundredths."""
    return float(int(value * 100 // 1)) / 100

"""A run of the tuner: shapes one by one, with a journal and the data file."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import threading
from collections.abc import Callable
from pathlib import Path

from benchmarks import block_choice, cases, environment, journal
from benchmarks.tuning import search, trials
from benchmarks.tuning.search import CandidateError, Limits
from jax_kernels import tuned
from jax_kernels.chips import Chip
from jax_kernels.ragged_paged_attention import block_sizes
from jax_kernels.ragged_paged_attention.config import BlockSizes


@dataclasses.dataclass(frozen=True)
class Run:
    """Tunes shapes one by one and keeps what it learns.

    Attributes:
      kind: "prediction" or "measurement".
      known: Results of candidates.
      output: The data file.
      extent: As ``search.tune`` has it.
      tell: Called with a description of each candidate before it is tried.
    """

    kind: str
    known: journal.Journal
    output: Path
    extent: str
    tell: Callable[[str], None] = lambda candidate: None
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
        found = search.tune(
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
        sizes = "/".join(map(str, search.part(blocks, phase)))
        return f"{self.kind} {chip.name} {shape} {phase} {sizes}"

    def _fits(
        self, shape: cases.StaticShape, chip: Chip, blocks: BlockSizes, phase: str
    ) -> bool:
        """Whether a phase fits; noted where not."""
        key = self._key(shape, chip, blocks, phase)
        if key in self.known.records:
            return "failure" not in self.known.records[key]
        try:
            trials.check_fits(shape, chip, blocks, phase)
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
            is_predicted = self.kind == "prediction"
            cost = trials.predict_blocks if is_predicted else trials.time_blocks
            sizes = ", ".join(f"{k} {n}" for k, n in dataclasses.asdict(blocks).items())
            self.tell(f"{sizes} on {chip.name}")
            try:
                found = cost(shape, chip, blocks)
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

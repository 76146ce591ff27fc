"""What a run cost, and where."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from benchmarks.tpu_timing.control_flow import EXIT
from benchmarks.tpu_timing.dma import CODE
from benchmarks.tpu_timing.program import Program


@dataclass
class Visits:
    """What the blocks of a run cost, each by its first bundle.

    Attributes:
      runs: How often a block was executed.
      edges: How often one block followed another.
      cycles: Spent in a block, stalls included.
      dma_wait_cycles: Of those, in waits for DMAs.
      mxu_stall_cycles: Of those, in waits for a matrix unit.
      code_wait_cycles: Of those, in jumps to the overlay of the block: until its
        instructions are there.
    """

    runs: dict[int, int]
    edges: dict[tuple[int, int], int]
    cycles: dict[int, float]
    dma_wait_cycles: dict[int, float]
    mxu_stall_cycles: dict[int, float]
    code_wait_cycles: dict[int, float]

    @classmethod
    def none(cls, program: Program) -> Visits:
        """Before the first block."""
        blocks = program.blocks
        times = (dict.fromkeys(blocks, 0.0) for _ in range(4))
        return cls(dict.fromkeys(blocks, 0), {}, *times)

    def per_bundle(self, program: Program) -> np.ndarray:
        """How often each bundle was executed."""
        steps = np.zeros(len(program.bundles) + 1, np.int64)
        for start, count in self.runs.items():
            block = program.blocks[start]
            steps[block.start] += count
            steps[block.end] -= count
        return np.cumsum(steps)[:-1]


@dataclass
class Loop:
    """Where the time of a loop went, all its iterations together."""

    start: int
    end: int
    depth: int
    entries: int
    iterations: int
    bundles: int  # cycles of the listing, without stalls
    cycles: float
    dma_wait_cycles: float
    mxu_stall_cycles: float
    code_wait_cycles: float
    busiest_units: dict[str, float]  # share of each unit's capacity while in the loop


@dataclass
class Result:
    """What a run cost. Cycles are of the TensorCore's clock."""

    kernel: str
    chip: str
    cycles: float
    seconds: float
    schedule_cycles: int
    executed_bundles: int
    dma_wait_cycles: float
    mxu_stall_cycles: float
    code_wait_cycles: float  # until instructions were there, the start included
    code_start_cycles: float  # of those, before the first bundle
    drain_cycles: float
    bytes_moved: dict[str, int]
    dma_count: dict[str, int]
    waits: int
    stalled_waits: int
    hbm_busy_cycles: float
    unit_busy: dict[str, int]
    unit_share: dict[str, float]
    mxu_occupied_cycles: dict[int, int]
    matmuls: int
    nonzero_flags: dict[int, int]
    loops: list[Loop]
    warnings: list[str]
    host_seconds: float
    timeline: list = field(default_factory=list, repr=False)
    transfers: list = field(default_factory=list, repr=False)

    @property
    def microseconds(self) -> float:
        return self.seconds * 1e6

    @property
    def code_bytes(self) -> int:
        """Of the instructions that were fetched."""
        return self.bytes_moved.get(CODE, 0)

    @property
    def code_fetches(self) -> int:
        """Overlays that were fetched."""
        return self.dma_count.get(CODE, 0)


def find_loops(program: Program, visits: Visits) -> list[Loop]:
    """Loops that were executed, those that took the longest first."""
    back: dict[int, tuple[int, int]] = {}  # end and number of branches, by header
    for (start, following), count in visits.edges.items():
        block = program.blocks[start]
        if following != EXIT and following <= block.start:
            end, taken = back.get(following, (0, 0))
            back[following] = (max(end, block.end), taken + count)
    per_bundle = visits.per_bundle(program)
    loops = []
    for header, (end, taken) in back.items():
        inside = [start for start in visits.runs if header <= start < end]
        cycles = sum(visits.cycles[start] for start in inside)
        usage = per_bundle[header:end] @ program.units.usage[header:end]
        share = unit_share(program, usage, cycles) if cycles else {}
        loops.append(
            Loop(
                start=header,
                end=end,
                depth=program.bundles[header].depth,
                entries=visits.runs[header] - taken,
                iterations=visits.runs[header],
                bundles=sum(
                    visits.runs[start] * (program.blocks[start].end - start)
                    for start in inside
                ),
                cycles=float(cycles),
                dma_wait_cycles=float(sum(visits.dma_wait_cycles[b] for b in inside)),
                mxu_stall_cycles=float(sum(visits.mxu_stall_cycles[b] for b in inside)),
                code_wait_cycles=float(sum(visits.code_wait_cycles[b] for b in inside)),
                busiest_units=dict(sorted(share.items(), key=lambda i: -i[1])[:4]),
            )
        )
    return sorted(loops, key=lambda loop: -loop.cycles)


def unit_share(program: Program, usage: np.ndarray, cycles: float) -> dict[str, float]:
    """Use of each unit as a share of what it could do in so many cycles."""
    units = program.units
    return {
        name: float(used / (capacity * cycles)) if cycles else 0.0
        for name, used, capacity in zip(units.names, usage, units.capacity, strict=True)
    }

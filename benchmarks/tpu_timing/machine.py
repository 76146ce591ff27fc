"""Executes a program's scalar code and accounts for time."""

from __future__ import annotations

import bisect
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from benchmarks.tpu_timing import core, isa
from benchmarks.tpu_timing.dma import DmaEngine, DmaModel, SyncFlagDeadlock
from benchmarks.tpu_timing.program import EXIT, WORD_BYTES, Program
from jax_kernels.chips import Chip

DEFAULT_DMA = DmaModel()


class SimulationError(Exception):
    """The program did what the model has no meaning for."""


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


class Machine:
    """One TensorCore with a program and the values of its scalar operands."""

    def __init__(
        self,
        program: Program,
        chip: Chip,
        dma_model: DmaModel = DEFAULT_DMA,
        operands: dict[int, np.ndarray] | None = None,
        *,
        keep_timeline: bool = False,
        model_mxu_stalls: bool = True,
        max_blocks: int = 200_000_000,
    ):
        self.program = program
        self.chip = chip
        self.operand_values = {k: np.asarray(v) for k, v in (operands or {}).items()}
        self.dma = DmaEngine(chip, dma_model, program.granule_bytes, keep_timeline)
        self.keep_timeline = keep_timeline
        self.model_mxu_stalls = model_mxu_stalls
        self.max_blocks = max_blocks
        self.s = [0] * 64
        self.p = [False] * 32
        self.smem = [0] * program.smem_words
        self.words: dict[
            tuple[str, int], list[int]
        ] = {}  # contents by (space, region base)
        self.sync_values: deque[int] = deque()
        self.mxu_free = [0.0] * 8
        self.mxu_stall_cycles = 0.0
        self.mxu_memo: dict = {}
        self.stretch_runs: dict[int, int] = {}
        self.bad_loads = 0
        self.unknown_reads: set[str] = set()
        self.matmul_cost = self._matmul_costs()
        self._region_keys = [(r.space, r.base) for r in program.regions]
        self._write_operands()

    def _matmul_costs(self) -> dict[str, int]:
        dtypes = {
            dtype
            for stretch in self.program.stretches
            for _, _, dtype in stretch.issues
        }
        known = core.vmatmul_cycles(self.chip)
        self.unknown_matmuls = sorted(dtypes - set(known))
        return {**known, **dict.fromkeys(self.unknown_matmuls, known["bf16"])}

    # --- memory ------------------------------------------------------------

    def _write_operands(self):
        for region in self.program.regions:
            index = region.operand_index
            if index is None:
                words = region.granules * self.program.granule_bytes // WORD_BYTES
                self.words[region.space, region.base] = [0] * words
            elif index in self.operand_values:
                values = np.ascontiguousarray(
                    self.operand_values[index].astype(np.int32).ravel()
                )
                self.words[region.space, region.base] = values.tolist()
        for index, operand in self.program.operands.items():
            if operand.space == "smem" and index in self.operand_values:
                values = self.operand_values[index].astype(np.int32).ravel().tolist()
                base = self.program.operand_base[index]
                self.smem[base : base + len(values)] = values

    def operand(self, index: int) -> np.ndarray:
        """Words of an operand after the run, as far as SMEM transfers wrote them."""
        for region in self.program.regions:
            if region.operand_index == index:
                return np.array(
                    self.words.get((region.space, region.base), []), np.int32
                )
        raise KeyError(index)

    def _region(self, space, granule):
        position = bisect.bisect_right(self._region_keys, (space, granule)) - 1
        if position >= 0:
            region = self.program.regions[position]
            if region.space == space and granule < region.base + region.granules:
                return region
        raise SimulationError(
            f"SMEM transfer with {space} granule {granule:#x} outside every operand"
        )

    def _load(self, address):
        if 0 <= address < len(self.smem):
            return self.smem[address]
        self.bad_loads += 1
        return 0

    def _store(self, address, value):
        if not 0 <= address < len(self.smem):
            raise SimulationError(f"store to SMEM word {address}")
        self.smem[address] = value

    def _copy_to_smem(self, space, granule, smem_address, count):
        region = self._region(space, granule)
        words = self.words.get((space, region.base))
        if words is None:
            self.unknown_reads.add(region.name)
            return region
        first = (granule - region.base) * self.program.granule_bytes // WORD_BYTES
        data = words[first : first + count]
        if not 0 <= smem_address <= len(self.smem) - len(data):
            raise SimulationError(f"transfer to SMEM word {smem_address}")
        self.smem[smem_address : smem_address + len(data)] = data
        return region

    def _copy_from_smem(self, smem_address, space, granule, count):
        region = self._region(space, granule)
        key = (space, region.base)
        if key not in self.words:
            self.words[key] = [0] * (
                region.granules * self.program.granule_bytes // WORD_BYTES
            )
        first = (granule - region.base) * self.program.granule_bytes // WORD_BYTES
        self.words[key][first : first + count] = self.smem[
            smem_address : smem_address + count
        ]
        return region

    # --- hooks called by the generated code ---------------------------------

    def _dma(
        self, now, source, source_address, target, target_address, granules, flag, steps
    ):
        if granules < 0:
            raise SimulationError(f"{source}_to_{target} of {granules} granules")
        count = granules * self.program.granule_bytes // WORD_BYTES
        region = None
        if count and target == "smem":
            region = self._copy_to_smem(source, source_address, target_address, count)
        elif count and source == "smem":
            region = self._copy_from_smem(source_address, target, target_address, count)
        is_spill = region is not None and region.operand_index is None
        # steps_per_stride counts steps of 512 bytes
        piece = steps * 512 // self.program.granule_bytes
        self.dma.issue(now, source, target, granules, flag, piece, is_spill)

    def _matmuls(self, number, now):
        stretch = self.program.stretches[number]
        self.stretch_runs[number] = self.stretch_runs.get(number, 0) + 1
        if not self.model_mxu_stalls:
            return now + stretch.cycles
        free = self.mxu_free
        entry = tuple(f - now if f > now else 0 for f in free)
        key = (number, entry)
        memo = self.mxu_memo.get(key)
        if memo is None:
            cost = self.matmul_cost
            busy, stall = list(entry), 0
            for offset, mxu, dtype in stretch.issues:
                at = offset + stall
                if busy[mxu] > at:
                    stall += busy[mxu] - at
                    at = busy[mxu]
                busy[mxu] = at + cost[dtype]
            memo = self.mxu_memo[key] = (stall, tuple(busy))
        stall, busy = memo
        self.mxu_free = [now + b for b in busy]
        self.mxu_stall_cycles += stall
        return now + stretch.cycles + stall

    def _unsupported(self, text):
        raise isa.UnsupportedInstruction(text)

    def _halt(self, text):
        raise SimulationError(f"the program halts itself: {text}")

    def _scalar_operand(self, index):
        if index not in self.operand_values:
            raise SimulationError(f"operand {index} is passed by value: give it")
        return int(self.operand_values[index].ravel()[0])

    # --- running -------------------------------------------------------------

    def run(self) -> Result:
        engine = self.dma
        namespace = {
            "s": self.s,
            "p": self.p,
            "smem": self.smem,
            "load": self._load,
            "store": self._store,
            "dma": self._dma,
            "wait": engine.wait,
            "matmuls": self._matmuls,
            "sync_add": lambda t, flag, amount: engine.add(flag, amount),
            "sync_set": lambda t, flag, amount: engine.set(flag, amount),
            "sync_read": lambda t, flag: self.sync_values.append(engine.read(t, flag)),
            "sync_values": self.sync_values,
            "halt": self._halt,
            "wrap": isa.signed32,
            "float32": isa.float32_arithmetic,
            "unsupported": self._unsupported,
            "scalar_operand": self._scalar_operand,
        }
        exec(self.program.code or self.program.source, namespace)
        blocks = namespace["blocks"]
        runs: dict[int, int] = dict.fromkeys(blocks, 0)
        edges: dict[tuple[int, int], int] = {}
        spent = dict.fromkeys(blocks, 0.0)
        waited = dict.fromkeys(blocks, 0.0)
        stalled = dict.fromkeys(blocks, 0.0)
        timeline = []
        began = time.perf_counter()
        at, now, executed = 0, 0, 0
        while at != EXIT:
            wait_before, stall_before = engine.wait_cycles, self.mxu_stall_cycles
            try:
                following, after = blocks[at](now)
            except (
                SyncFlagDeadlock,
                SimulationError,
                isa.UnsupportedInstruction,
            ) as error:
                raise SimulationError(
                    f"block {at:#x} at cycle {now:.0f}: {error}"
                ) from error
            runs[at] += 1
            edge = (at, following)
            edges[edge] = edges.get(edge, 0) + 1
            spent[at] += after - now
            waited[at] += engine.wait_cycles - wait_before
            stalled[at] += self.mxu_stall_cycles - stall_before
            if self.keep_timeline:
                timeline.append((at, now, after, engine.wait_cycles - wait_before))
            at, now = following, after
            executed += 1
            if executed > self.max_blocks:
                raise SimulationError("block limit reached")
        end = max(now, engine.last_done)
        return self._result(
            runs,
            edges,
            spent,
            waited,
            stalled,
            now,
            end,
            time.perf_counter() - began,
            timeline,
        )

    def _result(
        self, runs, edges, spent, waited, stalled, now, end, host_seconds, timeline
    ):
        program = self.program
        per_bundle = np.zeros(len(program.bundles) + 1, np.int64)
        for start, count in runs.items():
            block = program.blocks[start]
            per_bundle[block.start] += count
            per_bundle[block.end] -= count
        per_bundle = np.cumsum(per_bundle)[:-1]
        nonempty = np.array([bool(b.text) for b in program.bundles])
        units = per_bundle @ program.unit_usage
        unit_busy = dict(zip(program.unit_names, map(int, units), strict=True))
        unit_share = {
            n: float(u / (c * end)) if end else 0.0
            for n, u, c in zip(
                program.unit_names, units, program.unit_capacity, strict=True
            )
        }
        occupied: dict[int, int] = {}
        matmuls = 0
        for number, count in self.stretch_runs.items():
            for _, mxu, dtype in program.stretches[number].issues:
                occupied[mxu] = occupied.get(mxu, 0) + count * self.matmul_cost[dtype]
                matmuls += count
        warnings = list(program.warnings)
        if self.unknown_matmuls:
            warnings.append(
                f"vmatmul types {self.unknown_matmuls} are costed like bf16"
            )
        if self.bad_loads:
            warnings.append(
                f"{self.bad_loads} SMEM loads outside SMEM returned 0 "
                "(speculative loads)"
            )
        if self.unknown_reads:
            warnings.append(
                "SMEM was loaded from operands without values: "
                f"{sorted(self.unknown_reads)}"
            )
        flags = self.dma.finish()
        return Result(
            kernel=program.kernel,
            chip=self.chip.name,
            cycles=float(end),
            seconds=self.chip.rates.seconds(end),
            schedule_cycles=int(per_bundle @ program.cycles_of_bundle),
            executed_bundles=int(per_bundle[nonempty].sum()),
            dma_wait_cycles=float(self.dma.wait_cycles),
            mxu_stall_cycles=float(self.mxu_stall_cycles),
            drain_cycles=float(end - now),
            bytes_moved=dict(self.dma.bytes_moved),
            dma_count=dict(self.dma.count),
            waits=self.dma.waits,
            stalled_waits=self.dma.stalled_waits,
            hbm_busy_cycles=float(self.dma.channel_busy),
            unit_busy=unit_busy,
            unit_share=unit_share,
            mxu_occupied_cycles=dict(sorted(occupied.items())),
            matmuls=matmuls,
            nonzero_flags=flags,
            loops=self._loops(runs, edges, spent, waited, stalled, per_bundle),
            warnings=warnings,
            host_seconds=host_seconds,
            timeline=timeline,
            transfers=self.dma.transfers or [],
        )

    def _loops(self, runs, edges, spent, waited, stalled, per_bundle):
        program = self.program
        back = {}
        for (start, following), count in edges.items():
            block = program.blocks[start]
            if following != EXIT and following <= block.start:
                end, taken = back.get(following, (0, 0))
                back[following] = (max(end, block.end), taken + count)
        loops = []
        for header, (end, taken) in back.items():
            inside = [b for b in runs if header <= b < end]
            usage = per_bundle[header:end] @ program.unit_usage[header:end]
            cycles = sum(spent[b] for b in inside)
            share = (
                {
                    n: float(u / (c * cycles))
                    for n, u, c in zip(
                        program.unit_names, usage, program.unit_capacity, strict=True
                    )
                }
                if cycles
                else {}
            )
            top = dict(sorted(share.items(), key=lambda item: -item[1])[:4])
            loops.append(
                Loop(
                    start=header,
                    end=end,
                    depth=program.bundles[header].depth,
                    entries=runs[header] - taken,
                    iterations=runs[header],
                    bundles=int(
                        sum(
                            runs[b]
                            * int(
                                program.cycles_of_bundle[
                                    b : program.blocks[b].end
                                ].sum()
                            )
                            for b in inside
                        )
                    ),
                    cycles=float(cycles),
                    dma_wait_cycles=float(sum(waited[b] for b in inside)),
                    mxu_stall_cycles=float(sum(stalled[b] for b in inside)),
                    busiest_units=top,
                )
            )
        return sorted(loops, key=lambda loop: -loop.cycles)


def simulate(
    program: Program,
    chip: Chip,
    operands: dict[int, np.ndarray],
    dma_model: DmaModel = DEFAULT_DMA,
    **options,
) -> Result:
    """Runs a program; ``operands`` are by index, those that reach SMEM only."""
    return Machine(program, chip, dma_model, operands, **options).run()

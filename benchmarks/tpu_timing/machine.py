"""Executes a program's scalar code and accounts for time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

import numpy as np

from benchmarks.tpu_timing import code_size, core, isa
from benchmarks.tpu_timing.control_flow import EXIT
from benchmarks.tpu_timing.dma import DmaEngine, DmaModel, SyncFlagDeadlock
from benchmarks.tpu_timing.instruction_memory import InstructionMemory
from benchmarks.tpu_timing.memory_map import GRANULE_BYTES
from benchmarks.tpu_timing.program import Program
from benchmarks.tpu_timing.result import Loop, Result, Visits, find_loops, unit_share
from benchmarks.tpu_timing.scalar_memory import ScalarMemory, SimulationError
from jax_kernels.chips import Chip

DEFAULT_DMA = DmaModel()
# Overlays of a program have positive numbers.
_NO_OVERLAY = 0
# Loops with less of the time are not worth a note.
_HOT_SHARE = 0.1


class Machine:
    """One TensorCore with a program and the values of its scalar operands.

    A run begins with the jump into the kernel's first overlay. With ``is_resident``
    that overlay is in instruction memory already, as in a loop of calls, and the jump
    costs nothing. Otherwise no overlay is.
    """

    # Vector code is not computed. Where a program reads a vector value back into a
    # scalar register (vpush, spop), ``vector_results`` is what it gets, as the 32 bits
    # in the register; 0 is false, 0 and 0.0. It is an assumption about the data, which
    # the caller must make: without it such a read stops the run.
    def __init__(
        self,
        program: Program,
        chip: Chip,
        dma_model: DmaModel = DEFAULT_DMA,
        operands: Mapping[int, np.ndarray] | None = None,
        *,
        vector_results: int | None = None,
        is_resident: bool = False,
        keep_timeline: bool = False,
        model_mxu_stalls: bool = True,
        max_blocks: int = 200_000_000,
    ):
        self.program = program
        self.chip = chip
        self.operand_values = {k: np.asarray(v) for k, v in (operands or {}).items()}
        self.memory = ScalarMemory(program, self.operand_values)
        self.dma = DmaEngine(chip, dma_model, GRANULE_BYTES, keep_timeline)
        self.vector_results = vector_results
        self.vector_results_read = 0
        self.is_resident = is_resident
        self.instructions, self.overlay_of = self._load_code()
        self.keep_timeline = keep_timeline
        self.model_mxu_stalls = model_mxu_stalls
        self.max_blocks = max_blocks
        self.s = [0] * 64
        self.p = [False] * 32
        self.sync_values: deque[int] = deque()
        self.remainders: deque[int] = deque()
        self.mxu_free = [0.0] * 8
        self.mxu_stall_cycles = 0.0
        self.mxu_memo: dict = {}
        self.stretch_runs: dict[int, int] = {}
        self.matmul_cost = self._matmul_costs()

    def _load_code(self) -> tuple[InstructionMemory | None, dict[int, int]]:
        """Instruction memory before the run, and the overlay of each block."""
        program, layout = self.program, self.program.overlays
        if layout is None:
            return None, dict.fromkeys(program.blocks, _NO_OVERLAY)
        memory = InstructionMemory(layout.program, self.dma, program.branch_delay_slots)
        return memory, {
            start: layout.overlay_at(int(program.final_addresses[start]))
            for start in program.blocks
        }

    def _matmul_costs(self) -> dict[str, int]:
        dtypes = {
            dtype
            for stretch in self.program.stretches
            for _, _, dtype in stretch.issues
        }
        known = core.vmatmul_cycles(self.chip)
        self.unknown_matmuls = sorted(dtypes - set(known))
        return {**known, **dict.fromkeys(self.unknown_matmuls, known["bf16"])}

    # --- hooks called by the generated code ---------------------------------

    def _dma(
        self, now, source, source_address, target, target_address, granules, flag, steps
    ):
        if granules < 0:
            raise SimulationError(f"{source}_to_{target} of {granules} granules")
        region = None
        if granules and target == "smem":
            region = self.memory.copy_to_smem(
                source, source_address, target_address, granules
            )
        elif granules and source == "smem":
            region = self.memory.copy_from_smem(
                source_address, target, target_address, granules
            )
        is_spill = region is not None and region.operand_index is None
        # steps_per_stride counts steps of 512 bytes
        piece = steps * 512 // GRANULE_BYTES
        self.dma.issue(now, source, target, granules, flag, piece, is_spill)

    def _wait(self, now, flag, granules):
        if granules < 0:
            raise SimulationError(f"flag {flag} is awaited with {granules} granules")
        return self.dma.wait(now, flag, granules)

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

    def _vector_result(self, text):
        if self.vector_results is None:
            raise SimulationError(
                f"{text!r} reads back a value of the vector unit, which is not "
                "computed: give vector_results, the bits that all such reads get"
            )
        self.vector_results_read += 1
        return self.vector_results

    # --- running -------------------------------------------------------------

    def run(self) -> Result:
        engine = self.dma
        namespace = {
            "s": self.s,
            "p": self.p,
            "smem": self.memory.smem,
            "load": self.memory.load,
            "store": self.memory.store,
            "dma": self._dma,
            "wait": self._wait,
            "matmuls": self._matmuls,
            "sync_add": lambda t, flag, amount: engine.add(flag, amount),
            "sync_set": lambda t, flag, amount: engine.set(flag, amount),
            "sync_read": lambda t, flag: self.sync_values.append(engine.read(t, flag)),
            "sync_values": self.sync_values,
            "remainders": self.remainders,
            "halt": self._halt,
            "wrap": isa.signed32,
            "float32": isa.float32_arithmetic,
            "float32_is": isa.float32_comparison,
            "vector_result": self._vector_result,
            "unsupported": self._unsupported,
            "scalar_operand": self._scalar_operand,
        }
        exec(self.program.code, namespace)
        blocks = namespace["blocks"]
        visits = Visits.none(self.program)
        # One block is a few microseconds: no attribute is looked up in the loop.
        runs, edges, spent = visits.runs, visits.edges, visits.cycles
        waited, stalled = visits.dma_wait_cycles, visits.mxu_stall_cycles
        fetching = visits.code_wait_cycles
        timeline = []
        began = time.perf_counter()
        last, at, executed = EXIT, 0, 0
        instructions, overlay_of = self.instructions, self.overlay_of
        overlay = overlay_of[at]
        start_cycles = now = self._begin(overlay)
        spent[at] = fetching[at] = start_cycles
        while at != EXIT:
            if overlay_of[at] != overlay and instructions is not None:
                overlay = overlay_of[at]
                before, now = now, instructions.enter(now, overlay)
                spent[at] += now - before
                fetching[at] += now - before
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
            last, at, now = at, following, after
            executed += 1
            if executed > self.max_blocks:
                raise SimulationError("block limit reached")
        if instructions is not None:
            before, now = now, instructions.leave(now)
            spent[last] += now - before
            fetching[last] += now - before
        host_seconds = time.perf_counter() - began
        return self._result(visits, start_cycles, now, host_seconds, timeline)

    def _begin(self, overlay: int) -> float:
        """Jumps into the first overlay; returns when its first bundle runs."""
        if self.instructions is None:
            return 0.0
        if self.is_resident:
            self.instructions.hold(overlay)
            return 0.0
        return self.instructions.enter(0.0, overlay)

    def _result(
        self,
        visits: Visits,
        start_cycles: float,
        now: float,
        host_seconds: float,
        timeline: list,
    ) -> Result:
        program = self.program
        end = max(now, self.dma.last_done)
        per_bundle = visits.per_bundle(program)
        is_nonempty = np.array([bool(bundle.text) for bundle in program.bundles])
        usage = per_bundle @ program.units.usage
        loops = find_loops(program, visits)
        occupied: dict[int, int] = {}
        matmuls = 0
        for number, count in self.stretch_runs.items():
            for _, mxu, dtype in program.stretches[number].issues:
                occupied[mxu] = occupied.get(mxu, 0) + count * self.matmul_cost[dtype]
                matmuls += count
        return Result(
            kernel=program.kernel,
            chip=self.chip.name,
            cycles=float(end),
            seconds=self.chip.rates.seconds(end),
            schedule_cycles=int(per_bundle.sum()),
            executed_bundles=int(per_bundle[is_nonempty].sum()),
            dma_wait_cycles=float(self.dma.wait_cycles),
            mxu_stall_cycles=float(self.mxu_stall_cycles),
            code_wait_cycles=float(sum(visits.code_wait_cycles.values())),
            code_start_cycles=float(start_cycles),
            drain_cycles=float(end - now),
            bytes_moved=dict(self.dma.bytes_moved),
            dma_count=dict(self.dma.count),
            waits=self.dma.waits,
            stalled_waits=self.dma.stalled_waits,
            hbm_busy_cycles=float(self.dma.channel_busy),
            unit_busy=dict(zip(program.units.names, map(int, usage), strict=True)),
            unit_share=unit_share(program, usage, end),
            mxu_occupied_cycles=dict(sorted(occupied.items())),
            matmuls=matmuls,
            nonzero_flags=self.dma.finish(),
            loops=loops,
            warnings=[*self._warnings(), *self._code_warnings(loops, end)],
            host_seconds=host_seconds,
            timeline=timeline,
            transfers=self.dma.transfers or [],
        )

    def _warnings(self) -> list[str]:
        warnings = list(self.program.warnings)
        if self.unknown_matmuls:
            warnings.append(
                f"vmatmul types {self.unknown_matmuls} are costed like bf16"
            )
        if self.vector_results_read:
            warnings.append(
                f"{self.vector_results_read} values read back from the vector unit "
                f"were assumed to be {self.vector_results}"
            )
        if self.memory.bad_loads:
            warnings.append(
                f"{self.memory.bad_loads} SMEM loads outside SMEM returned 0 "
                "(speculative loads)"
            )
        if self.memory.unknown_reads:
            warnings.append(
                "SMEM was loaded from operands without values: "
                f"{sorted(self.memory.unknown_reads)}"
            )
        return warnings

    def _code_warnings(self, loops: list[Loop], cycles: float) -> list[str]:
        """Of loops with much time that need a jumbo overlay."""
        sizes = self.program.overlay_sizes
        hot = {
            (loop.start, loop.end)
            for loop in loops
            if loop.cycles > _HOT_SHARE * cycles
        }
        return [
            f"{loop} is one jumbo overlay, since a regular one takes {sizes.regular} "
            "bundles: it is fetched as a whole, and little stays beside it"
            for loop in code_size.loop_sizes(self.program)
            if sizes.regular < loop.bundles <= sizes.jumbo
            and (loop.start, loop.end) in hot
        ]


def simulate(
    program: Program,
    chip: Chip,
    operands: dict[int, np.ndarray],
    dma_model: DmaModel = DEFAULT_DMA,
    **options,
) -> Result:
    """Runs a program; ``operands`` are by index, those that reach SMEM only."""
    return Machine(program, chip, dma_model, operands, **options).run()

"""Predicts calls of other kernels: executes their kernels as ours are.

What a call needs is counted from the shape that was asked for, whatever a peer pads.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.peers.calls import PEERS, PeerCall
from benchmarks.peers.compilation import compile_call
from benchmarks.tpu_timing import (
    DmaModel,
    Program,
    Result,
    load_kernel,
    simulate,
    workloads,
)
from jax_kernels import chips


@dataclasses.dataclass(frozen=True)
class PeerPrediction:
    """What the instrument says of a call.

    Attributes:
      call: The call.
      results: Of its kernels, in the order of execution.
      versions: Of packages.
    """

    call: PeerCall
    results: tuple[Result, ...]
    versions: dict[str, str]

    @property
    def cycles(self) -> float:
        return sum(result.cycles for result in self.results)

    @property
    def microseconds(self) -> float:
        return sum(result.microseconds for result in self.results)

    @property
    def dma_wait_cycles(self) -> float:
        return sum(result.dma_wait_cycles for result in self.results)

    @property
    def mxu_stall_cycles(self) -> float:
        return sum(result.mxu_stall_cycles for result in self.results)

    @property
    def code_wait_cycles(self) -> float:
        return sum(result.code_wait_cycles for result in self.results)

    @property
    def code_start_cycles(self) -> float:
        """Of the waits for instructions, those before the first bundles of kernels."""
        return sum(result.code_start_cycles for result in self.results)

    @property
    def unit_share(self) -> dict[str, float]:
        """Use of each unit as a share of what it could do in all the time."""
        shares: dict[str, float] = {}
        for result in self.results:
            for name, share in result.unit_share.items():
                weighted = share * result.cycles / self.cycles
                shares[name] = shares.get(name, 0.0) + weighted
        return shares

    @property
    def warnings(self) -> list[str]:
        found = [warning for result in self.results for warning in result.warnings]
        for result in self.results:
            if result.nonzero_flags:
                found.append(
                    f"{result.kernel}: sync flags left non-zero: {result.nonzero_flags}"
                )
        return found

    @property
    def shares(self) -> dict[str, float]:
        """MBU, MFU and the like, see ``workloads.utilization``."""
        return workloads.utilization(
            self.microseconds / 1e6, chips.COMPILED[self.call.chip], self.call.ideal
        )

    def as_dict(self) -> dict:
        """What JSON has of it."""
        return {
            "call": dataclasses.asdict(self.call),
            "kind": "prediction",
            "versions": self.versions,
            "kernels": [result.kernel for result in self.results],
            "cycles": self.cycles,
            "microseconds": self.microseconds,
            "dma_wait_cycles": self.dma_wait_cycles,
            "mxu_stall_cycles": self.mxu_stall_cycles,
            "code_wait_cycles": self.code_wait_cycles,
            "code_start_cycles": self.code_start_cycles,
            "unit_share": self.unit_share,
            "warnings": self.warnings,
            **self.shares,
        }


def predict_call(
    call: PeerCall,
    directory: str | Path | None = None,
    python: str | None = None,
    dma_model: DmaModel | None = None,
    programs: dict[tuple[Path, str], Program] | None = None,
    *,
    clock: str = "highest",
) -> PeerPrediction:
    """Predicts the time of a call, which is compiled if it was not yet.

    Args:
      call: What to predict.
      directory: As in ``compile_call``.
      python: As in ``compile_call``.
      dma_model: Of the memory; the instrument's own if None.
      programs: Programs that were read before, which it adds to, for calls that share
        some.
      clock: One of ``chips.CLOCKS``.

    Raises:
      SimulationError: The instrument cannot follow a kernel.
      ValueError, RuntimeError: As ``compile_call``.
    """
    compiled = compile_call(call, directory, python)
    chip = chips.COMPILED[call.chip]
    programs = {} if programs is None else programs
    results = []
    previous: Program | None = None
    for kernel, operands in zip(compiled.kernels, compiled.operands, strict=True):
        key = compiled.dump, kernel
        if key not in programs:
            programs[key] = load_kernel(compiled.dump, kernel, chip)
        program = programs[key]
        results.append(
            simulate(
                program,
                chip.at_clock(clock),
                operands,
                dma_model or DmaModel(),
                vector_results=PEERS[call.peer].vector_results,
                is_resident=previous is not None and program.begins_where(previous),
            )
        )
        previous = program
    return PeerPrediction(call, tuple(results), compiled.versions)

"""A kernel that can be executed."""

from __future__ import annotations

import types
from dataclasses import dataclass

import numpy as np

from benchmarks.tpu_timing import isa, listing
from benchmarks.tpu_timing.codegen import MatmulStretch
from benchmarks.tpu_timing.control_flow import Block
from benchmarks.tpu_timing.isa import Instruction
from benchmarks.tpu_timing.memory_map import MemoryMap
from benchmarks.tpu_timing.overlays import Layout, OverlaySizes


@dataclass(frozen=True)
class UnitUse:
    """What the functional units do in each bundle.

    Attributes:
      names: Of the units.
      capacity: [units], instructions that a unit takes in one bundle.
      usage: [bundles, units], instructions that it has.
    """

    names: list[str]
    capacity: np.ndarray
    usage: np.ndarray


@dataclass(frozen=True)
class Program:
    """A kernel: its listing, and what was made of it.

    Attributes:
      kernel: Name.
      bundles: The listing. Each bundle takes one cycle.
      scalar_code: Decoded instructions of each bundle, vector instructions left out.
      operands: Of the kernel, by index.
      memory: Where operands and allocations are.
      branch_delay_slots: Bundles executed after every branch.
      blocks: Of the program, by their first bundle.
      stretches: Matmuls that the code refers to by number.
      source: Python source of the functions of all blocks.
      code: The same, compiled.
      units: Of the TensorCore.
      final_addresses: [bundles + 1], where each bundle is in the final listing, which
        lacks most of the empty ones; see ``listing.final_addresses``.
      overlays: In which instructions are fetched; None if the compiler did not say.
      overlay_sizes: How long overlays may be.
      warnings: What may make predictions less exact.
      bytes_around: Moved in HBM by other operations of the program that was compiled,
        before and after the kernel.
    """

    kernel: str
    bundles: list[listing.Bundle]
    scalar_code: list[list[Instruction]]
    operands: dict[int, isa.KernelOperand]
    memory: MemoryMap
    branch_delay_slots: int
    blocks: dict[int, Block]
    stretches: list[MatmulStretch]
    source: str
    code: types.CodeType
    units: UnitUse
    final_addresses: np.ndarray
    overlays: Layout | None
    overlay_sizes: OverlaySizes
    warnings: list[str]
    bytes_around: float = 0

    def begins_where(self, previous: Program) -> bool:
        """Whether it begins in the overlay in which a kernel before it ends."""
        before, here = previous.overlays, self.overlays
        if before is None or here is None or before.program != here.program:
            return False
        last = int(previous.final_addresses[-1]) - 1
        return here.overlay_at(0) == before.overlay_at(last)

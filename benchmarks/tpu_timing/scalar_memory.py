"""Contents of SMEM, and of what DMAs move to and from it."""

from __future__ import annotations

import bisect
from collections.abc import Mapping

import numpy as np

from benchmarks.tpu_timing.memory_map import GRANULE_BYTES, WORD_BYTES, Region
from benchmarks.tpu_timing.program import Program


class SimulationError(Exception):
    """The program did what the model has no meaning for."""


class ScalarMemory:
    """The words that the scalar unit may come to see.

    Attributes:
      smem: Words of SMEM.
      bad_loads: Loads from outside SMEM, which give 0.
      unknown_reads: Names of the operands that were read and have no values.
    """

    def __init__(self, program: Program, operands: Mapping[int, np.ndarray]):
        """Writes the values of operands, by index, to where the program has them."""
        memory = program.memory
        self._regions = memory.regions
        self._region_keys = [(region.space, region.base) for region in memory.regions]
        self._words: dict[tuple[str, int], list[int]] = {}  # by space and region base
        self.smem = [0] * memory.smem_words
        self.bad_loads = 0
        self.unknown_reads: set[str] = set()
        values = {
            index: value.astype(np.int32).ravel().tolist()
            for index, value in operands.items()
        }
        for region in memory.regions:
            if region.operand_index is None:
                self._words[region.space, region.base] = [0] * region.words
            elif region.operand_index in values:
                words = values[region.operand_index]
                self._words[region.space, region.base] = words.copy()
        for index, operand in program.operands.items():
            if operand.space == "smem" and index in values:
                base = memory.operand_base[index]
                self.smem[base : base + len(values[index])] = values[index]

    def load(self, address: int) -> int:
        if 0 <= address < len(self.smem):
            return self.smem[address]
        self.bad_loads += 1
        return 0

    def store(self, address: int, value: int) -> None:
        if not 0 <= address < len(self.smem):
            raise SimulationError(f"store to SMEM word {address}")
        self.smem[address] = value

    def copy_to_smem(
        self, space: str, granule: int, smem_address: int, granules: int
    ) -> Region:
        """Copies words of a region to SMEM; returns the region."""
        region = self._region(space, granule)
        words = self._words.get((space, region.base))
        if words is None:
            self.unknown_reads.add(region.name)
            return region
        first = (granule - region.base) * GRANULE_BYTES // WORD_BYTES
        data = words[first : first + granules * GRANULE_BYTES // WORD_BYTES]
        if not 0 <= smem_address <= len(self.smem) - len(data):
            raise SimulationError(f"transfer to SMEM word {smem_address}")
        self.smem[smem_address : smem_address + len(data)] = data
        return region

    def copy_from_smem(
        self, smem_address: int, space: str, granule: int, granules: int
    ) -> Region:
        """Copies words of SMEM to a region; returns the region."""
        region = self._region(space, granule)
        words = self._words.setdefault((space, region.base), [0] * region.words)
        first = (granule - region.base) * GRANULE_BYTES // WORD_BYTES
        count = granules * GRANULE_BYTES // WORD_BYTES
        words[first : first + count] = self.smem[smem_address : smem_address + count]
        return region

    def _region(self, space: str, granule: int) -> Region:
        position = bisect.bisect_right(self._region_keys, (space, granule)) - 1
        if position >= 0:
            region = self._regions[position]
            if region.space == space and granule < region.base + region.granules:
                return region
        raise SimulationError(
            f"SMEM transfer with {space} granule {granule:#x} outside every operand"
        )

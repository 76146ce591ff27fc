"""Contents of SMEM, and of what DMAs move to and from it."""

from __future__ import annotations

import bisect
from collections.abc import Mapping

import numpy as np

from benchmarks.tpu_timing.memory_map import (
    GRANULE_BYTES,
    WORD_BYTES,
    Region,
    operand_bytes,
)
from benchmarks.tpu_timing.program import Program


class SimulationError(Exception):
    """The program did what the model has no meaning for."""


_LANES = 128


def packed_words(values: np.ndarray, itemsize: int) -> list[int]:
    """Words of a one-dimensional array of 8 or 16 bits, as its tiles have them.

    Of 512 elements of 8 bits, word ``i`` has elements ``i``, ``i + 128``, ``i + 256``
    and ``i + 384``, the first one in its lowest byte. Of 16 bits it has two.
    """
    parts = WORD_BYTES // itemsize
    tile = parts * _LANES
    padded = np.zeros(-(-len(values) // tile) * tile, np.int64)
    padded[: len(values)] = values
    fields = padded.reshape(-1, parts, _LANES) & (1 << 8 * itemsize) - 1
    shifts = 8 * itemsize * np.arange(parts)[:, None]
    return (fields << shifts).sum(1).astype(np.uint32).view(np.int32).ravel().tolist()


def _words_of(dtype: str, values: np.ndarray) -> list[int]:
    """Words of an operand.

    Raises:
      SimulationError: Packed elements in more than one dimension.
    """
    itemsize = operand_bytes(dtype, (1,))
    if itemsize == WORD_BYTES:
        return values.astype(np.int32).ravel().tolist()
    if values.ndim != 1:
        raise SimulationError(
            f"operand of {dtype}: expected one dimension, got shape {values.shape}"
        )
    return packed_words(values, itemsize)


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
            index: _words_of(program.operands[index].dtype, value)
            for index, value in operands.items()
            if index in program.operands
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

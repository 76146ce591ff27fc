"""Where the operands and allocations of a kernel are: an address for each.

The compiler fixes few addresses. The others are chosen here, such that nothing
overlaps; which ones they are has no influence on time.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from benchmarks.tpu_timing import isa, listing
from benchmarks.tpu_timing.isa import Instruction

GRANULE_BYTES = 32  # unit of HBM addresses and DMA sizes, on every generation tried
VMEM_ROW_BYTES = 512  # unit of VMEM addresses
WORD_BYTES = 4  # unit of SMEM and sync-flag addresses

_UNIT_BYTES = {
    "smem": WORD_BYTES,
    "sflag": WORD_BYTES,
    "vmem": VMEM_ROW_BYTES,
    "hbm": GRANULE_BYTES,
}
_ALIGNMENT = 512  # bytes, of what is in VMEM and HBM
_OPERAND_ALIGNMENT = 1 << 20  # bytes, of operands in HBM
_FIRST_FREE = {"smem": 0x400, "sflag": 0x100, "vmem": 0, "hbm": 1 << 20}  # bytes
# Allocations of unknown size: address units that each gets, far from the others.
_FIRST_UNKNOWN, _UNKNOWN_SIZE = 1 << 22, 1 << 16
_SPARE_SMEM_WORDS = 1 << 14

_DTYPE_BYTES = {
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "s8": 1,
    "u8": 1,
    "pred": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "f8e4m3": 1,
    "s4": 0.5,
    "u4": 0.5,
    "f4e2m1fn": 0.5,
}


@dataclass(frozen=True)
class Region:
    """An operand or spill area whose words can be moved to or from SMEM.

    Attributes:
      space: "hbm" or "vmem".
      name: For messages.
      base: First granule.
      granules: How many.
      operand_index: None of a spill area.
    """

    space: str
    name: str
    base: int
    granules: int
    operand_index: int | None

    @property
    def words(self) -> int:
        return self.granules * GRANULE_BYTES // WORD_BYTES


@dataclass
class MemoryMap:
    """Addresses, each in the unit of its memory.

    Attributes:
      hbm_pointer_granules: Unit of HBM addresses in registers; DMAs count granules.
      allocation_base: By the number of the allocation.
      operand_base: By the index of the operand; of HBM in granules.
      regions: In the order of their addresses.
      smem_words: Size of SMEM.
      warnings: Of what had to be guessed.
    """

    hbm_pointer_granules: int = 1
    allocation_base: dict[int, int] = field(default_factory=dict)
    operand_base: dict[int, int] = field(default_factory=dict)
    regions: list[Region] = field(default_factory=list)
    smem_words: int = 0
    warnings: list[str] = field(default_factory=list)

    def operand_register(self, operand: isa.KernelOperand) -> int:
        """What the register of an operand holds at the start."""
        base = self.operand_base[operand.index]
        return base // self.hbm_pointer_granules if operand.space == "hbm" else base


def lay_out(
    bundles: list[listing.Bundle],
    scalar_code: list[list[Instruction]],
    allocations: dict[int, listing.Allocation],
    operands: dict[int, isa.KernelOperand],
) -> MemoryMap:
    """Gives an address to everything that a program mentions."""
    memory = MemoryMap(_hbm_pointer_granules(scalar_code))
    next_free = dict(_FIRST_FREE)  # bytes
    _place_allocations(memory, allocations, next_free)
    _place_unknown_allocations(memory, bundles, bool(allocations), next_free)
    _place_operands(memory, operands, next_free)
    memory.smem_words = next_free["smem"] // WORD_BYTES + _SPARE_SMEM_WORDS
    memory.regions.sort(key=lambda region: (region.space, region.base))
    return memory


def _hbm_pointer_granules(scalar_code: list[list[Instruction]]) -> int:
    """v5e keeps HBM pointers in 512-byte units and shifts them left by 4 for DMAs."""
    shifted = any(i.opcode == "int_to_ptr.hbm" for code in scalar_code for i in code)
    return 16 if shifted else 1


def _place_allocations(
    memory: MemoryMap,
    allocations: dict[int, listing.Allocation],
    next_free: dict[str, int],
) -> None:
    for number, allocation in sorted(allocations.items()):
        space = allocation.space
        unit = _UNIT_BYTES.get(space, WORD_BYTES)
        if allocation.offset is not None:
            memory.allocation_base[number] = allocation.offset // unit
            continue
        align = max(unit, _ALIGNMENT if space in ("vmem", "hbm") else WORD_BYTES)
        base = _rounded_up(next_free.setdefault(space, _FIRST_FREE["smem"]), align)
        next_free[space] = base + allocation.size
        memory.allocation_base[number] = base // unit
        if space == "hbm":
            memory.allocation_base[number] //= memory.hbm_pointer_granules
            _add_region(memory, "hbm", f"allocation{number}", base, allocation.size)


def _place_unknown_allocations(
    memory: MemoryMap,
    bundles: list[listing.Bundle],
    has_table: bool,
    next_free: dict[str, int],
) -> None:
    """Places allocations that bundles mention and the compiler's table does not."""
    mentioned: set[int] = set()
    for bundle in bundles:
        mentioned.update(map(int, re.findall(r"#allocation(\d+)", bundle.text)))
    missing = sorted(mentioned - set(memory.allocation_base))
    if not missing:
        return
    if has_table:
        memory.warnings.append(f"{len(missing)} allocations are not in the table")
    for position, number in enumerate(missing):
        memory.allocation_base[number] = _FIRST_UNKNOWN + position * _UNKNOWN_SIZE
    end = (_FIRST_UNKNOWN + len(missing) * _UNKNOWN_SIZE) * WORD_BYTES
    next_free["smem"] = max(next_free["smem"], end)


def _place_operands(
    memory: MemoryMap,
    operands: dict[int, isa.KernelOperand],
    next_free: dict[str, int],
) -> None:
    """Places operands; an output is where the input that it takes over is."""
    next_hbm = _rounded_up(next_free["hbm"], _OPERAND_ALIGNMENT)
    for index, operand in sorted(operands.items()):
        size = operand_bytes(operand.dtype, operand.shape)
        if operand.space == "value":
            continue
        if (
            operand.alias
            and index == operand.alias[1]
            and operand.alias[0] in memory.operand_base
        ):
            memory.operand_base[index] = memory.operand_base[operand.alias[0]]
        elif operand.space in ("vmem", "smem"):
            base = _rounded_up(next_free[operand.space], _ALIGNMENT)
            next_free[operand.space] = base + size
            memory.operand_base[index] = base // _UNIT_BYTES[operand.space]
            if operand.space == "vmem":
                _add_region(memory, "vmem", f"operand{index}", base, size, index)
        else:
            memory.operand_base[index] = next_hbm // GRANULE_BYTES
            _add_region(memory, "hbm", f"operand{index}", next_hbm, size, index)
            next_hbm += _rounded_up(max(size, 1), _OPERAND_ALIGNMENT)


def _add_region(
    memory: MemoryMap,
    space: str,
    name: str,
    base: int,
    size: int,
    operand_index: int | None = None,
) -> None:
    """Adds a region by its first byte and its size in bytes."""
    granules = -(-size // GRANULE_BYTES)
    region = Region(space, name, base // GRANULE_BYTES, granules, operand_index)
    memory.regions.append(region)


def operand_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size of an array; an unknown dtype counts as one of four bytes."""
    return int(math.prod(shape) * _DTYPE_BYTES.get(dtype, 4))


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit

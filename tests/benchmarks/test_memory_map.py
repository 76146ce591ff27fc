"""Addresses that the instrument chooses, and the contents of scalar memory."""

import numpy as np
import pytest

from benchmarks.tpu_timing import isa, listing, load_kernel, memory_map
from benchmarks.tpu_timing.scalar_memory import ScalarMemory, SimulationError
from tests.benchmarks import synthetic_dump


def operand(index: int, space: str = "hbm", size: int = 1024, alias=None):
    return isa.KernelOperand(index, "s32", (size,), "input", alias, space)


def lay_out(*operands: isa.KernelOperand, text: str = "", allocations=()):
    bundles = [listing.Bundle(0, "", 0, text)]
    code = [[isa.parse_instruction(part) for part in isa.split_bundle(text)]]
    table = {allocation.number: allocation for allocation in allocations}
    return memory_map.lay_out(bundles, code, table, {o.index: o for o in operands})


def test_nothing_overlaps():
    allocations = [
        listing.Allocation(number, space, size, None, "")
        for number, (space, size) in enumerate([("hbm", 100), ("hbm", 5), ("vmem", 9)])
    ]
    operands = [operand(n, size=1 << (10 * n)) for n in range(3)]
    memory = lay_out(*operands, operand(3, "vmem"), allocations=allocations)
    assert [r.space for r in memory.regions] == ["hbm"] * 5 + ["vmem"]
    for near, far in zip(memory.regions, memory.regions[1:], strict=False):
        assert near.space != far.space or near.base + near.granules <= far.base


def test_an_output_is_where_the_input_that_it_takes_over_is():
    memory = lay_out(operand(0), operand(1), operand(2, alias=(1, 2)))
    assert memory.operand_base[2] == memory.operand_base[1] != memory.operand_base[0]
    assert [region.name for region in memory.regions] == ["operand0", "operand1"]


def test_a_fixed_address_stays_in_the_unit_of_its_memory():
    fixed = listing.Allocation(7, "vmem", 4096, 1024, "")
    assert lay_out(allocations=[fixed]).allocation_base == {7: 2}


def test_pointers_may_count_in_larger_units_than_dmas():
    text = "%s2_s1 = int_to_ptr.hbm %s1_s1"
    coarse, fine = lay_out(operand(0), text=text), lay_out(operand(0))
    assert coarse.operand_base == fine.operand_base
    registers = [memory.operand_register(operand(0)) for memory in (coarse, fine)]
    assert registers[1] == fine.operand_base[0] == 16 * registers[0]


def test_an_allocation_that_the_table_lacks_is_placed_and_reported():
    known = listing.Allocation(1, "smem", 4, None, "")
    text = "%1 = sst [smem:[#allocation2]] %s1_s1"
    assert lay_out(text=text).warnings == []
    memory = lay_out(text=text, allocations=[known])
    assert memory.warnings == ["1 allocations are not in the table"]
    assert memory.allocation_base[1] < memory.allocation_base[2] < memory.smem_words


def test_sizes_are_in_bytes():
    assert memory_map.operand_bytes("bf16", (3, 5)) == 30
    assert memory_map.operand_bytes("s4", (8,)) == 4
    assert memory_map.operand_bytes("something new", (2,)) == 8


@pytest.fixture
def memory(tmp_path):
    program = load_kernel(synthetic_dump.write(tmp_path), "toy")
    values = {0: np.arange(128)}
    return ScalarMemory(program, values), program.memory


def test_words_go_from_an_operand_to_smem_and_back(memory):
    scalar, places = memory
    base = places.operand_base[0]
    assert scalar.copy_to_smem("hbm", base + 1, 50, 2).name == "operand0"
    assert scalar.smem[50:67] == [*range(8, 24), 0]
    scalar.store(50, -1)
    scalar.copy_from_smem(50, "hbm", base, 1)
    scalar.copy_to_smem("hbm", base, 80, 2)
    assert scalar.smem[80:90] == [-1, *range(9, 16), 8, 9]


def test_what_is_outside_gives_0_or_is_an_error(memory):
    scalar, places = memory
    assert scalar.load(-1) == scalar.load(places.smem_words) == 0
    assert scalar.bad_loads == 2
    with pytest.raises(SimulationError, match="store to SMEM word -1"):
        scalar.store(-1, 0)
    with pytest.raises(SimulationError, match="outside every operand"):
        scalar.copy_to_smem("hbm", 0, 0, 1)
    with pytest.raises(SimulationError, match="transfer to SMEM word -3"):
        scalar.copy_to_smem("hbm", places.operand_base[0], -3, 1)

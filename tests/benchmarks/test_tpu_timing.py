"""The instrument on a toy kernel whose time can be counted by hand."""

import json
import re

import numpy as np
import pytest

from benchmarks.tpu_timing import (
    DmaModel,
    Machine,
    SimulationError,
    find_stale_reads,
    isa,
    load_kernel,
    report,
    simulate,
)
from benchmarks.tpu_timing.dma import DmaEngine, SyncFlagDeadlock
from benchmarks.tpu_timing.instruction_memory import JUMP_BRANCHES
from jax_kernels.chips import Chip, Rates
from tests.benchmarks import synthetic_dump

# One cycle per nanosecond and 32 bytes per cycle make expected times readable.
TOY_CHIP = Chip("toy", vmem_bytes=0, known_rates=Rates(1e9, 32e9, 1000))
TOY_DMA = DmaModel(latency_s=100e-9, efficiency=1.0)


def test_predicated_move_keeps_old_value():
    move = isa.parse_instruction("%s9_s18 = smov.u32 (!%p3_p7, %s2_s18), 128")
    assert move.target == isa.Register("s", 18, "%s9_s18")
    assert move.predicate == isa.Predicate(
        isa.Register("p", 7, "%p3_p7"),
        expected=False,
        otherwise=isa.Register("s", 18, "%s2_s18"),
    )
    assert move.operands == [isa.Immediate(128)]


@pytest.mark.parametrize(
    "text", ["%p3_p2 = pphi %p1_p2, %p2_p2", "%s3_s2 = sphi %s1_s2"]
)
def test_a_phi_of_one_register_is_another_name(text):
    assert isa.parse_instruction(text).is_rename


def test_what_the_compiler_knows_to_be_skipped_has_no_effect():
    wait = isa.parse_instruction("%9 = dma.done.wait (0), [#allocation62], 0")
    assert wait.opcode == isa.NEVER
    assert not wait.undecoded
    assert wait.target is None


def test_immediates_are_signed():
    add = isa.parse_instruction("%s1_s2 = sadd.s32 4294967168, %s3_s4")
    assert add.operands[0] == isa.Immediate(-128)


def test_float_arithmetic_is_on_bits():
    multiply = isa.parse_instruction("%s1_s2 = smul.f32 1.5, %s3_s4")
    assert not multiply.undecoded
    factor = multiply.operands[0]
    assert isinstance(factor, isa.Immediate)
    bits = isa.float32_arithmetic("smul", factor.value, 0x40000000)
    assert isa.float32_value(bits) == 3.0
    huge = isa.float32_bits(3e38)
    assert isa.float32_value(isa.float32_arithmetic("sadd", huge, huge)) == float("inf")


def test_store_with_predicate_and_offset():
    store = isa.parse_instruction(
        "%7 = sst [smem:[%s1_s23 + $0x4]] (%p5_p3), /*sx=*/%s9_s25"
    )
    assert store.operands == [
        isa.Address(None, (isa.Register("s", 23, "%s1_s23"),), 4),
        isa.Register("s", 25, "%s9_s25"),
    ]
    assert store.predicate == isa.Predicate(
        isa.Register("p", 3, "%p5_p3"), expected=True
    )


def test_lea_annotation_is_not_an_operand():
    lea = isa.parse_instruction("%s1_s30 = scalar_lea.sflag %s2_s22, 2 [#allocation6]")
    assert len(lea.operands) == 2
    assert lea.operands[1] == isa.Immediate(2)


def test_dma_operands():
    dma = isa.parse_instruction(
        "%4 = dma.hbm_to_vmem [thread:$0]  (%p1_p3), /*hbm=*/%s1_s1, "
        "/*size_in_granules=*/%s2_s17, /*vmem=*/%s3_s23, "
        "/*dst_syncflagno=*/[#allocation6 + $0x2], /*src_stride=*/%s4_s6, "
        "/*dst_stride=*/%s5_s0, /*steps_per_stride=*/%s6_s15"
    )
    assert dma.named["dst_syncflagno"] == isa.Address(6, (), 2)
    assert dma.named["steps_per_stride"] == isa.Register("s", 15, "%s6_s15")


def test_matmuls():
    text = (
        "%1 = vmatmul.mubr.f32.gmra.mrb[68].mxu0 %v1_v1  ;;  "
        "%2 = vmatprep.mubr.bf16.mxu1 %v2_v2  ;;  "
        "%3 = vmatmul.bf16.vlgmr.msra.gmra.mxu3 %v3_v3"
    )
    expected = [isa.MatmulIssue(0, "f32"), isa.MatmulIssue(3, "bf16")]
    assert isa.matmul_issues(text) == expected


def test_vector_instructions_are_skipped():
    assert isa.is_vector("%1 = vst [vmem:[#allocation7] sm:$0x3] %v1_v0")
    assert isa.is_vector("%v1_v0 = vmov 0")
    assert not isa.is_vector("%1 = vsyncadd [#allocation1], 5")
    assert not isa.is_vector("%p1_p0 = pnand %p2_p1, %p3_p2")


def engine(**model):
    model = {"latency_s": 100e-9, "efficiency": 1.0, **model}
    return DmaEngine(TOY_CHIP, DmaModel(**model), 32, False)


def test_transfers_share_the_channel_and_latency_overlaps():
    dmas = engine()
    dmas.issue(0, "hbm", "vmem", 1000, 1, 0)
    dmas.issue(0, "hbm", "vmem", 1000, 1, 0)
    assert dmas.wait(0, 1, 1000) == 1100
    assert dmas.wait(1100, 1, 2000) == 2100
    assert dmas.wait_cycles == 2100


def test_short_pieces_cost_whole_pieces():
    dmas = engine()
    dmas.issue(0, "hbm", "vmem", 64, 1, 4)  # 16 pieces of 128 bytes, 512 moved for each
    assert dmas.wait(0, 1, 64) == 16 * 512 / 32 + 100


def test_efficiency_and_descriptor():
    dmas = engine(efficiency=0.5, descriptor_s=10e-9)
    dmas.issue(0, "vmem", "hbm", 1000, 1, 0)
    assert dmas.wait(0, 1, 1000) == 2110


def test_wait_without_transfer_is_a_deadlock():
    with pytest.raises(SyncFlagDeadlock):
        engine().wait(0, 1, 5)


@pytest.fixture
def folder(tmp_path):
    return synthetic_dump.write(tmp_path)


@pytest.fixture
def program(folder):
    return load_kernel(folder, "toy")


def count_operand(count):
    return {0: np.array([count] + [0] * 127)}


def run_toy(program, count, **options):
    machine = Machine(program, TOY_CHIP, TOY_DMA, count_operand(count), **options)
    return machine, machine.run()


def edit_listing(folder, old, new):
    (path,) = folder.glob("*packed-bundles-post-ra.txt")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_properties_read_from_the_listing(program):
    assert program.branch_delay_slots == 6
    assert find_stale_reads(program) == []
    assert program.warnings == []


def test_loop_runs_and_delay_slots_execute(program):
    machine, result = run_toy(program, 3)
    base = program.memory.allocation_base[2]
    assert machine.memory.smem[base + 1 : base + 3] == [3, 3]
    assert result.bytes_moved["hbm_to_vmem"] == 3 * 32768
    assert result.nonzero_flags == {}
    (loop,) = result.loops
    assert (loop.start, loop.end) == (0xE, 0x1C)
    assert (loop.entries, loop.iterations) == (1, 3)


def test_skipped_loop(program):
    machine, result = run_toy(program, 0)
    assert "hbm_to_vmem" not in result.bytes_moved
    assert result.schedule_cycles == 14 + 1
    assert machine.s[6] == 1024  # written in the last delay slot


def test_time_adds_up(program):
    _, result = run_toy(program, 2)
    # 14 bundles before the loop, 14 per iteration, 2 after it.
    assert result.schedule_cycles == 14 + 2 * 14 + 2
    prefetch = 16 + 100 - 1  # issued one bundle before the wait
    fetch = 1024 + 100 - 1
    assert result.dma_wait_cycles == prefetch + 2 * fetch
    assert result.mxu_stall_cycles == 2 * 7  # second matmul one bundle after the first
    # The 29 bundles of the kernel are four granules of 512 bytes.
    start = JUMP_BRANCHES * 7 + 4 * 512 / 32 + 100
    assert result.code_wait_cycles == result.code_start_cycles == start
    assert result.cycles == result.schedule_cycles + result.dma_wait_cycles + 14 + start
    assert result.mxu_occupied_cycles == {0: 2 * 2 * 8}
    assert result.unit_busy["MATMUL"] == 4


def test_final_listing_alone(folder):
    """Branches name regions there, and folded delays are lost."""
    for path in folder.glob("*packed-bundles-post-ra.txt"):
        path.unlink()
    program = load_kernel(folder, "toy")
    result = simulate(program, TOY_CHIP, count_operand(2), TOY_DMA)
    assert result.nonzero_flags == {}
    assert result.schedule_cycles == 14 + 2 * 14 + 2 - 1


def test_first_bundle_may_reuse_the_register_of_an_operand(folder):
    edit_listing(folder, "%s12_s2 = smov.u32 [#allocation2]", "%s12_s2 = smov.u32 1")
    edit_listing(folder, "%s11_s1 = inlined", "%s11_s2 = inlined")
    source = load_kernel(folder, "toy").source
    assert source.index("s[2] = 65536") < source.index("s[2] = 1\n")


def test_missing_operand_is_reported(program):
    result = Machine(program, TOY_CHIP, TOY_DMA, {}).run()
    assert any("without values" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    "instruction",
    [
        "spop.v2sf %9",
        "sadd.bf16 %s1_s3, 1",
        "smin.u8 %s1_s3, 1",
        "smulhi.s32 %s1_s3, 1",
    ],
)
def test_unknown_scalar_instruction_stops_the_run(folder, instruction):
    edit_listing(folder, "smov.u32 0 }", f"{instruction} }}")
    with pytest.raises(SimulationError, match=re.escape(instruction)):
        simulate(load_kernel(folder, "toy"), TOY_CHIP, count_operand(0), TOY_DMA)


def test_negative_wait_stops_the_run(folder):
    edit_listing(folder, "wait [#allocation1], 16", "wait [#allocation1], 4294967280")
    with pytest.raises(SimulationError, match="awaited with -16 granules"):
        simulate(load_kernel(folder, "toy"), TOY_CHIP, count_operand(0), TOY_DMA)


def test_comments_over_several_lines(folder):
    halt = "0x13   : > { %77 = shalt.err (%p15_p0) /* check\nhlo: toy\n */ }"
    edit_listing(folder, "0x13   : > {}", halt)
    program = load_kernel(folder, "toy")
    assert simulate(program, TOY_CHIP, count_operand(1), TOY_DMA).loops == []


def test_reports(program, tmp_path):
    _, result = run_toy(program, 3, keep_timeline=True)
    text = report.as_text(result)
    assert "loop 0xe-0x1c" in text
    assert "(1 overlays, 2048 bytes; 367 before the start)" in text
    content = json.loads(json.dumps(report.as_dict(result)))
    assert (content["code_fetches"], content["code_bytes"]) == (1, 2048)
    assert content["code_wait_cycles"] == content["code_start_cycles"] == 367
    path = tmp_path / "trace.json"
    report.write_trace(path, program, TOY_CHIP, result)
    events = json.loads(path.read_text())["traceEvents"]
    rows = {event["args"]["name"] for event in events if event["ph"] == "M"}
    memories = ("imem", "smem", "vmem")
    assert rows == {"toy.1 core (predicted)", *(f"hbm to {m}" for m in memories)}
    assert any(event["name"].endswith("in loop 0xe") for event in events)

"""The log of overlays, and programs that are cut by it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks import cases, compiler, prediction
from benchmarks.tpu_timing import (
    code_size,
    control_flow,
    core,
    load_kernel,
    overlays,
    simulate,
)
from benchmarks.tpu_timing.instruction_memory import JUMP_BRANCHES
from benchmarks.tpu_timing.overlays import LogError, Overlay, OverlaySizes
from benchmarks.tuning import trials
from jax_kernels import chips
from jax_kernels.chips import TPU7X, Chip, Rates
from jax_kernels.ragged_paged_attention import BlockSizes
from tests.benchmarks import synthetic_dump
from tests.benchmarks.test_tpu_timing import TOY_DMA, count_operand

RECORDED = Path(__file__).parent / "recorded"
LONG_LOOP = (RECORDED / "long_loop" / overlays.LOG_NAME).read_text()
TOY_CHIP = Chip("toy", vmem_bytes=0, known_rates=Rates(1e9, 32e9, 1000))
JUMP = JUMP_BRANCHES * 7


def log(*lines, thread=7):
    """Lines as libtpu writes them."""
    prefix = f"I1128 07:51:49.187220   {thread} overlay.cc:1] "
    return "".join(f"{prefix}{line}\n" for line in lines)


def program_log(*partitions, branches=(), thread=7, room=65056):
    """The log of a program; partitions are (start, end, bundles, prefetch)."""
    end = partitions[-1][1]
    return log(
        f"OverlayProgram(), input program bundle count: {end}",
        *(f"{source:>8} : branch to {target} (cond)" for source, target in branches),
        f"OverlayPartitioner (regular/jumbo/hlo overlay size 21680/{room}/48792, x):",
        f"Overlay allocation region (granules) start: 60, limit: {60 + room // 8}",
        "Overlay allocation table start: 38, limit: 58, records: 10",
        "Overlay #0, kind:0, bundles:416, partition [0, 0):0, default prefetch: #1",
        *(
            f"Overlay #{number}, kind:1, bundles:{bundles}, partition "
            f"[{start}, {end}):{end - start}, default prefetch: {prefetch}"
            for number, (start, end, bundles, prefetch) in enumerate(partitions, 1)
        ),
        thread=thread,
    )


def test_a_recorded_log():
    (program,) = overlays.parse_log(LONG_LOOP)
    assert len(program.overlays) == 7
    assert program.overlays[5] == Overlay(5, 65158, 70184, 5056, prefetch=2)
    assert program.overlays[5].bytes == 5056 * 64
    assert program.branches[70177] == 184  # the loop leads back
    assert program.sizes == core.OVERLAY_SIZES["tpu7x"] == OverlaySizes(21680, 65056)
    room = program.last_granule - program.first_granule
    assert room * overlays.GRANULE_BUNDLES == program.sizes.jumbo
    assert program.records == 10


def test_a_kernel_is_found_by_its_branches():
    programs = overlays.parse_log(LONG_LOOP)
    layout = overlays.find_kernel(programs, {14: 70016, 70009: 16}, 70028)
    assert layout is not None
    assert layout.first_bundle == 168
    assert layout.starts[:3] == ((0, 1), (16, 2), (21674, 3))
    assert [layout.overlay_at(n) for n in (0, 15, 16, 21673, 21674)] == [1, 1, 2, 2, 3]
    assert overlays.find_kernel(programs, {14: 70016, 70009: 17}, 70028) is None
    assert overlays.find_kernel(programs, {14: 70016, 70009: 16}, 70600) is None


def test_without_branches_a_kernel_is_found_only_where_nothing_is_cut():
    (cut,) = overlays.parse_log(LONG_LOOP)
    assert overlays.find_kernel([cut], {}, 10) is None
    (whole,) = overlays.parse_log(program_log((0, 500, 512, "n/a")))
    layout = overlays.find_kernel([whole, cut], {}, 10)
    assert layout is not None and layout.program is whole


def test_the_last_of_several_attempts_counts_and_threads_are_told_apart():
    first = program_log((0, 50, 64, "n/a"), branches=[(9, 20)])
    second = program_log((0, 60, 64, "n/a"), branches=[(19, 30)])
    other = program_log((0, 70, 72, "n/a"), branches=[(9, 21)], thread=8)
    mixed = [
        line
        for pair in zip(first.splitlines(), other.splitlines(), strict=True)
        for line in pair
    ]
    programs = overlays.parse_log("\n".join(mixed) + "\n" + second)
    assert sorted(p.overlays[1].end for p in programs) == [50, 60, 70]
    layout = overlays.find_kernel(programs, {4: 15}, 20)
    assert layout is not None and layout.first_bundle == 15


@pytest.mark.parametrize("lacking", ["region", "table", "Partitioner", "kind:1"])
def test_a_log_that_lacks_something_is_refused(lacking):
    lines = program_log((0, 500, 512, "n/a")).splitlines(keepends=True)
    with pytest.raises(LogError, match="log of overlays: expected"):
        overlays.parse_log("".join(line for line in lines if lacking not in line))


def test_only_what_is_read_of_a_log_is_kept(tmp_path):
    raw = tmp_path / "tpu_driver.here.me.log.INFO.20261128-1"
    text = program_log((0, 500, 512, "n/a"))
    raw.write_text(f"Log file created at\n{log('Merged partitions 1 into 2')}{text}")
    (tmp_path / "tpu_driver.INFO").symlink_to(raw.name)
    assert overlays.read_logs(tmp_path) == raw.read_text()
    overlays.keep_log(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [overlays.LOG_NAME]
    assert overlays.read_logs(tmp_path) == text


def test_a_recorded_kernel_is_found_in_its_log():
    program = load_kernel(RECORDED / "guarded_loop", "guarded_loop", TPU7X)
    assert program.overlays is not None
    assert program.overlays.first_bundle == 191
    assert program.overlays.program.overlays[1].bundles == 784
    assert program.warnings == []


def toy(directory, text=None):
    """The toy kernel with a log; its loop is in the bundles 13 to 26 when final."""
    synthetic_dump.write(directory)
    if text is not None:
        (directory / overlays.LOG_NAME).write_text(text)
    return load_kernel(directory, "toy")


# The kernel's branches, and the place of the kernel in the program.
BRANCHES, FIRST = {6: 28, 20: 13}, 100
PLACED = [(FIRST + source, FIRST + target) for source, target in BRANCHES.items()]


def run(program, count, **options):
    return simulate(program, TOY_CHIP, count_operand(count), TOY_DMA, **options)


def test_without_a_log_a_short_kernel_is_one_overlay(tmp_path):
    program = toy(tmp_path)
    result = run(program, 2)
    assert (result.code_fetches, result.code_bytes) == (1, 32 * 64)
    assert result.code_wait_cycles == result.code_start_cycles == JUMP + 64 + 100
    assert program.warnings == []
    without = run(program, 2, is_resident=True)
    assert without.code_fetches == without.code_wait_cycles == 0
    assert without.cycles == result.cycles - result.code_wait_cycles


def test_without_a_log_a_long_kernel_is_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "LEAST_OVERLAY_SIZES", OverlaySizes(20, 60))
    result = run(toy(tmp_path), 2)
    assert (result.code_fetches, result.code_wait_cycles) == (0, 0)
    (warning,) = result.warnings[:1]
    assert "29 bundles" in warning and "not counted" in warning


def test_a_log_of_another_program_is_said(tmp_path):
    text = program_log((0, 300, 304, "n/a"), branches=[(106, 129)])
    program = toy(tmp_path, text)
    assert program.warnings == ["the kernel is in no program of the log of overlays"]


def test_a_kernel_in_one_overlay_fetches_the_program_around_it(tmp_path):
    result = run(toy(tmp_path, program_log((0, 300, 304, "n/a"), branches=PLACED)), 2)
    assert (result.code_fetches, result.code_bytes) == (1, 304 * 64)
    assert result.code_start_cycles == JUMP + 304 * 64 / 32 + 100


def cut_in_the_loop(bundles, room=65056):
    """The loop's first half in one overlay, its second half in another."""
    cut = FIRST + 17
    return program_log(
        (0, cut, bundles, "n/a"), (cut, 300, bundles, "n/a"), branches=PLACED, room=room
    )


def test_blocks_are_cut_where_overlays_are(tmp_path):
    program = toy(tmp_path, cut_in_the_loop(160))
    assert 17 + 1 in program.blocks  # one bundle was folded away before it
    result = run(program, 5)
    # One jump to the start, two in each iteration, none at the end.
    jumps = 1 + 5 + 4
    fetch = 160 * 64 / 32 + 100
    assert result.code_fetches == 2
    assert result.code_wait_cycles == jumps * JUMP + 2 * fetch
    (loop,) = result.loops
    assert loop.code_wait_cycles == 9 * JUMP + fetch
    assert result.cycles == (
        result.schedule_cycles
        + result.dma_wait_cycles
        + result.mxu_stall_cycles
        + result.code_wait_cycles
    )


def test_a_loop_that_does_not_fit_fetches_in_every_iteration(tmp_path):
    fits = run(toy(tmp_path, cut_in_the_loop(32528)), 50)
    swaps = run(toy(tmp_path, cut_in_the_loop(32536)), 50)
    assert fits.code_fetches == 2
    assert swaps.code_fetches == 100
    assert swaps.cycles > 10 * fits.cycles


def test_a_loop_that_does_not_fit_is_said_at_once(tmp_path):
    program = toy(tmp_path, cut_in_the_loop(160, room=8))
    (loop,) = code_size.find_oversize_loops(program)
    assert (loop.loop.start, loop.loop.end, loop.loop.bundles) == (0xE, 0x1C, 14)
    (warning,) = run(program, 0).warnings
    assert "14 bundles" in warning and "takes 8 bundles" in warning


def test_commands_warn_of_a_loop_that_does_not_fit(tmp_path, capsys):
    shape = cases.BY_NAME["llama-decode-8x1k"].shape
    compiler.warn_of_loops(toy(tmp_path, cut_in_the_loop(160)), shape)
    assert capsys.readouterr().err == ""
    compiler.warn_of_loops(toy(tmp_path, cut_in_the_loop(160, room=8)), shape)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: Model(num_q_heads=32")
    assert "loop 0xe-0x1c of 14 bundles" in warning


def test_the_tuner_counts_fetches(tmp_path, monkeypatch):
    program = toy(tmp_path, cut_in_the_loop(160))
    monkeypatch.setattr(compiler, "compile_program", lambda *_: program)
    shape = cases.tuning_shape(cases.MQA)
    found = trials.predict_blocks(shape, TPU7X, BlockSizes(256, 128, 512))
    step = "128*1/300"
    result = prediction.predict(cases.Case(step, shape, step), TPU7X, program).result
    assert result.code_wait_cycles > 0
    assert found["decode"][step] == result.cycles


def test_a_hot_loop_in_a_jumbo_is_noted(tmp_path):
    text = program_log((0, 300, 304, "n/a"), branches=PLACED)
    program = toy(tmp_path, text.replace("21680/", "10/"))
    assert program.warnings == []
    assert run(program, 0).warnings == []
    (note,) = run(program, 9).warnings
    assert "one jumbo overlay" in note and "14 bundles" in note


def test_sizes_of_loops_count_no_folded_delays(tmp_path):
    program = toy(tmp_path)
    (size,) = code_size.loop_sizes(program)
    assert size == code_size.LoopSize(0xE, 0x1C, 14)
    folded = program.final_addresses.copy()
    folded[0x14:] -= 1  # as if the empty bundle 0x13 had been folded
    (size,) = code_size.loop_sizes(dataclasses.replace(program, final_addresses=folded))
    assert size.bundles == 13
    assert np.array_equal(program.final_addresses[:6], [0, 1, 2, 3, 4, 5])
    assert (program.final_addresses[6], program.final_addresses[-1]) == (5, 29)


def test_a_loop_around_the_whole_program_is_none(tmp_path, monkeypatch):
    program = toy(tmp_path)
    (inner,) = control_flow.static_loops(program.blocks)
    around = control_flow.StaticLoop(1, len(program.bundles) - 1)
    monkeypatch.setattr(control_flow, "static_loops", lambda _: [around, inner])
    (size,) = code_size.loop_sizes(program)
    assert (size.start, size.end) == (inner.start, inner.end)
    # If more is outside of it, it is a loop like others, and if there is no other.
    monkeypatch.setattr(code_size, "MOST_AROUND_A_PROGRAM", 0)
    assert len(code_size.loop_sizes(program)) == 2
    monkeypatch.undo()
    monkeypatch.setattr(control_flow, "static_loops", lambda _: [around])
    assert len(code_size.loop_sizes(program)) == 1


def test_every_compiled_chip_has_sizes():
    assert set(core.OVERLAY_SIZES) == set(chips.COMPILED)
    least = core.LEAST_OVERLAY_SIZES
    for sizes in core.OVERLAY_SIZES.values():
        assert least.jumbo <= sizes.jumbo < 65536
        assert least.regular <= sizes.regular <= sizes.jumbo / 3


def test_a_kernel_may_begin_where_another_ends(tmp_path):
    whole = toy(tmp_path, program_log((0, 300, 304, "n/a"), branches=PLACED))
    assert whole.begins_where(whole)
    cut = toy(tmp_path, cut_in_the_loop(160))
    assert not cut.begins_where(cut)
    assert not cut.begins_where(whole)

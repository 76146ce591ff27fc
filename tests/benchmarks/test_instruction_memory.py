"""Fetches of overlays: what stays in instruction memory, and what a jump costs."""

import itertools
import random

import pytest

from benchmarks.tpu_timing.dma import CODE, DmaEngine, DmaModel
from benchmarks.tpu_timing.instruction_memory import JUMP_BRANCHES, InstructionMemory
from benchmarks.tpu_timing.overlays import OverlaidProgram, Overlay, OverlaySizes
from jax_kernels.chips import Chip, Rates

# One granule of 512 bytes is 16 cycles of the channel.
TOY_CHIP = Chip("toy", vmem_bytes=0, known_rates=Rates(1e9, 32e9, 1000))
LATENCY = 100
GRANULE_CYCLES = 16
ROOM = 90  # granules
JUMP = JUMP_BRANCHES * 7


def memory_of(*overlays, records=10):
    """Instruction memory of overlays that are given as (granules, prefetch)."""
    program = OverlaidProgram(
        overlays={
            number: Overlay(number, 0, 0, 8 * granules, prefetch)
            for number, (granules, prefetch) in enumerate(overlays, 1)
        },
        branches={},
        first_granule=10,
        last_granule=10 + ROOM,
        records=records,
        sizes=OverlaySizes(8 * ROOM // 3, 8 * ROOM),
    )
    dma = DmaEngine(TOY_CHIP, DmaModel(latency_s=100e-9, efficiency=1.0), 32, True)
    return InstructionMemory(program, dma, branch_delay_slots=6), dma


def fetch_cycles(granules):
    return granules * GRANULE_CYCLES + LATENCY


def test_the_first_jump_waits_for_the_whole_overlay():
    memory, dma = memory_of((20, None))
    assert memory.enter(0.0, 1) == JUMP + fetch_cycles(20)
    assert dma.bytes_moved == {CODE: 20 * 512}
    assert memory.leave(5000.0) == 5000


def test_what_is_there_costs_the_jump_alone():
    memory, dma = memory_of((20, None), (20, None))
    memory.enter(0.0, 1)
    memory.enter(1000.0, 2)
    assert memory.enter(2000.0, 1) == 2000 + JUMP
    assert dma.count == {CODE: 2}


def test_an_overlay_that_is_held_is_not_fetched():
    memory, dma = memory_of((20, None))
    memory.hold(1)
    assert memory.enter(0.0, 1) == JUMP
    assert dma.count == {}


def test_a_prefetch_hides_behind_the_overlay_that_names_it():
    memory, _ = memory_of((20, 2), (30, None))
    started = memory.enter(0.0, 1)
    arrival = started + fetch_cycles(30)
    assert memory.enter(arrival, 2) == arrival + JUMP


def test_a_jump_waits_for_the_rest_of_a_prefetch_even_if_it_goes_elsewhere():
    memory, _ = memory_of((20, 2), (30, None), (1, None))
    started = memory.enter(0.0, 1)
    arrival = started + fetch_cycles(30)
    assert arrival > started + JUMP
    assert memory.enter(started, 3) == arrival + fetch_cycles(1)


def test_the_end_waits_for_a_prefetch():
    memory, _ = memory_of((20, 2), (30, None))
    started = memory.enter(0.0, 1)
    assert memory.leave(started) == started + fetch_cycles(30)


def test_a_needless_prefetch_delays_other_transfers():
    memory, dma = memory_of((20, 2), (30, None))
    started = memory.enter(0.0, 1)
    dma.issue(started, "hbm", "vmem", 16, 0, 0)
    assert dma.wait(started, 0, 16) == started + fetch_cycles(31)


def test_a_jumbo_leaves_room_for_nothing_else():
    memory, dma = memory_of((10, None), (ROOM, None))
    for number in (1, 2, 1, 2):
        memory.enter(0.0, number)
    assert dma.count == {CODE: 4}


def test_an_overlay_that_does_not_fit_behind_the_others_clears_the_table():
    memory, dma = memory_of(*[(30, None)] * 4)
    for number in (1, 2, 3, 4):
        memory.enter(0.0, number)
    assert dma.count == {CODE: 4}
    memory.enter(0.0, 4)
    assert dma.count == {CODE: 4}
    memory.enter(0.0, 3)
    assert dma.count == {CODE: 5}


def test_a_full_table_is_cleared():
    memory, dma = memory_of(*[(1, None)] * 3, records=2)
    for number in (1, 2, 3, 3, 2):
        memory.enter(0.0, number)
    assert dma.count == {CODE: 4}


def test_what_is_to_be_prefetched_stays_when_room_is_made():
    memory, dma = memory_of((30, None), (30, None), (30, None), (50, 1))
    for number in (1, 2, 3):
        memory.enter(0.0, number)
    memory.enter(0.0, 4)  # behind 1, in the place of 2 and 3
    assert dma.count == {CODE: 4}
    memory.enter(0.0, 1)
    assert dma.count == {CODE: 4}


def test_an_overlay_may_be_prefetched_to_where_the_others_were():
    memory, dma = memory_of((30, None), (50, 3), (20, None))
    memory.enter(0.0, 1)
    memory.enter(0.0, 2)  # 3 does not fit behind it, but before it
    assert dma.count == {CODE: 3}
    memory.enter(0.0, 3)
    assert dma.count == {CODE: 3}
    memory.enter(0.0, 2)  # it went on running, and the table had forgotten it
    assert dma.count == {CODE: 4}


@pytest.mark.parametrize("granules, fetches", [(45, 2), (46, 200)])
def test_two_overlays_in_turn_are_a_cliff_once_they_do_not_fit(granules, fetches):
    memory, dma = memory_of((granules, None), (granules, None))
    now = 0.0
    for _ in range(100):
        for number in (1, 2):
            now = memory.enter(now, number) + 10  # cycles of work
    assert dma.count[CODE] == fetches
    work = 200 * (10 + JUMP)
    assert now == work + fetches * fetch_cycles(granules)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_jumps_keeps_what_must_hold(seed):
    choose = random.Random(seed)
    count = choose.randrange(2, 12)
    overlays = [
        (choose.randrange(1, ROOM + 1), choose.choice([None, *range(1, count + 1)]))
        for _ in range(count)
    ]
    memory, dma = memory_of(*overlays, records=choose.randrange(1, 11))
    now = 0.0
    for _ in range(200):
        number = choose.randrange(1, count + 1)
        before = dma.count.get(CODE, 0)
        arrived = memory.enter(now, number)
        assert dma.count.get(CODE, 0) - before <= 2
        assert arrived >= now + JUMP
        assert arrived <= now + JUMP + 2 * fetch_cycles(ROOM)
        now = arrived + choose.randrange(1000)
    fetched = sum(memory.fetches.values())
    assert fetched == dma.count[CODE]
    sizes = {number: granules for number, (granules, _) in enumerate(overlays, 1)}
    moved = sum(512 * sizes[n] * times for n, times in memory.fetches.items())
    assert moved == dma.bytes_moved[CODE]
    # There is one fetch at a time.
    for earlier, later in itertools.pairwise(dma.transfers or []):
        assert later.issued >= earlier.done

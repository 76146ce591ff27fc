"""Basic blocks of small listings."""

import pytest

from benchmarks.tpu_timing import control_flow, isa, listing
from benchmarks.tpu_timing.control_flow import EXIT, Block


def form(texts: dict[int, str], total: int, delay_slots: int | None = 2, markers=None):
    """Blocks of a listing that is empty but for some bundles."""
    bundles = [
        listing.Bundle(n, (markers or {}).get(n, ""), 0, texts.get(n, ""))
        for n in range(total)
    ]
    code = [
        [isa.parse_instruction(part) for part in isa.split_bundle(bundle.text)]
        for bundle in bundles
    ]
    return control_flow.form_blocks(bundles, code, delay_slots)


def branch(target: int, condition: str = "") -> str:
    return f"%1 = sbr.rel {condition} target bundleno = {target} ({target:#x})"


def test_a_program_without_branches_is_one_block():
    assert form({}, 5) == {0: Block(0, 5, (EXIT,))}


def test_a_block_ends_after_the_delay_slots_of_its_branch():
    blocks = form({3: branch(8, "(%p1_p1)")}, 10)
    assert blocks == {
        0: Block(0, 6, (6, 8)),
        6: Block(6, 8, (8,)),
        8: Block(8, 10, (EXIT,)),
    }


def test_a_branch_to_a_region_that_is_named_nowhere_leads_to_the_exit_bundle():
    """As the final listing has it; the exit bundle is a fallthrough of a predicate."""
    away = {1: "%1 = sbr.rel (%p1_p1) target = $region7"}
    with_exit = form(away, 9, markers={8: "PF"})
    assert with_exit[0] == Block(0, 4, (4, 8))
    assert form(away, 9)[0] == Block(0, 4, (4, EXIT))


def test_what_no_branch_reaches_is_left_out():
    assert form({1: branch(7)}, 9) == {
        0: Block(0, 4, (7, 7)),
        7: Block(7, 9, (EXIT,)),
    }


def test_a_loop_leads_back_to_its_start():
    blocks = form({4: branch(2, "(!%p1_p1)")}, 8)
    assert blocks[2] == Block(2, 7, (7, 2))


def test_a_branch_may_be_the_first_of_its_block():
    blocks = form({2: branch(2, "(%p1_p1)")}, 6)
    assert blocks == {
        0: Block(0, 2, (2,)),
        2: Block(2, 5, (5, 2)),
        5: Block(5, 6, (EXIT,)),
    }


def test_folded_delay_slots_end_at_the_next_region():
    blocks = form({1: branch(4, "(%p1_p1)")}, 6, None, {3: "PF"})
    assert blocks[0] == Block(0, 3, (3, 4))


def test_a_branch_in_a_delay_slot_is_refused():
    with pytest.raises(isa.UnsupportedInstruction, match="delay slot at 0x2"):
        form({1: branch(5, "(%p1_p1)"), 2: branch(5, "(%p1_p1)")}, 8)


def test_two_branches_in_a_bundle_are_refused():
    with pytest.raises(isa.UnsupportedInstruction, match="two branches"):
        form({1: f"{branch(5)}  ;;  {branch(6)}"}, 8)

"""Branches, their delay slots, and the basic blocks between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from benchmarks.tpu_timing import isa, listing
from benchmarks.tpu_timing.isa import Instruction

EXIT = -1
_BRANCH = "sbr.rel"


@dataclass(frozen=True)
class Block:
    """Bundles that always execute one after the other.

    Attributes:
      start: First bundle.
      end: First bundle after the block, delay slots included.
      successors: The next block, or those without and with the branch taken. ``EXIT``
        is the end of the program.
    """

    start: int
    end: int
    successors: tuple[int, ...]


@dataclass(frozen=True)
class StaticLoop:
    """A loop of a listing, whether it runs or not.

    Attributes:
      start: First bundle.
      end: First bundle after all that lead back to the start.
    """

    start: int
    end: int


def infer_delay_slots(
    bundles: list[listing.Bundle], scalar_code: list[list[Instruction]]
) -> int:
    """Bundles executed after every branch: the shortest way from a branch to a join.

    Delay slots never contain the start of another region, and a loop's exit or
    header directly follows the delay slots of the branch before it.
    """
    joins = {b.address for b in bundles if b.marker in ("LB", "PF")}
    joins |= {
        i.branch_bundle
        for code in scalar_code
        for i in code
        if i.branch_bundle is not None
    }
    gaps, following = [], len(bundles)
    for address in range(len(bundles) - 1, -1, -1):
        if any(i.opcode == _BRANCH for i in scalar_code[address]):
            gaps.append(following - address - 1)
        if address in joins:
            following = address
    return min([*gaps, isa.MOST_BRANCH_DELAY_SLOTS])


def form_blocks(
    bundles: list[listing.Bundle],
    scalar_code: list[list[Instruction]],
    delay_slots: int | None,
    cuts: Iterable[int] = (),
) -> dict[int, Block]:
    """The blocks that execution can reach, by their first bundle.

    Args:
      bundles: The listing.
      scalar_code: Of each bundle.
      delay_slots: Of every branch; None if some may have been folded away, so that they
        end where the next region starts.
      cuts: Bundles where a block has to begin.

    Raises:
      UnsupportedInstruction: Two branches in a bundle, or one in a delay slot.
    """
    total = len(bundles)
    branches = find_branches(bundles, scalar_code)
    ends = {  # of the delay slots of each branch
        position: min(position + 1 + _slots(bundles, position, delay_slots), total)
        for position in branches
    }
    leaders = {0, *ends.values(), *(target for target, _ in branches.values()), *cuts}
    pending, blocks = [0], {}
    while pending:
        start = pending.pop()
        if start in blocks or start >= total:
            continue
        stop = start
        while stop < total and stop not in branches:
            stop += 1
            if stop in leaders:
                break
        if stop in branches and (stop == start or stop not in leaders):
            end = ends[stop]
            for slot in range(stop + 1, end):
                if slot in branches:
                    raise isa.UnsupportedInstruction(
                        f"branch in a delay slot at {slot:#x}"
                    )
            target, is_conditional = branches[stop]
            taken = _or_exit(target, total)
            through = _or_exit(end, total) if is_conditional else taken
            successors = (through, taken)
        else:
            end = stop
            successors = (_or_exit(end, total),)
        blocks[start] = Block(start, end, successors)
        pending.extend(s for s in successors if s != EXIT)
    return dict(sorted(blocks.items()))


def find_branches(
    bundles: list[listing.Bundle], scalar_code: list[list[Instruction]]
) -> dict[int, tuple[int, bool]]:
    """The target of each branch and whether it has a condition, by its bundle.

    Raises:
      UnsupportedInstruction: Two branches in a bundle.
    """
    region_start: dict[int | None, int] = {}
    for bundle in bundles:
        for region in bundle.starts_regions:
            region_start.setdefault(region, bundle.address)
    # The final listing says of the last bundle that it is the exit, and not which
    # region that branches lead to starts there.
    ends_in_exit = bool(bundles) and bundles[-1].marker == "PF"
    exit_bundle = len(bundles) - 1 if ends_in_exit else len(bundles)
    found = {}
    for position, code in enumerate(scalar_code):
        branches = [i for i in code if i.opcode == _BRANCH]
        if len(branches) > 1:
            raise isa.UnsupportedInstruction("two branches in one bundle")
        for branch in branches:
            target = branch.branch_bundle
            if target is None:
                target = region_start.get(branch.branch_region, exit_bundle)
            found[position] = (target, branch.predicate is not None)
    return found


def _slots(bundles: list[listing.Bundle], branch: int, delay_slots: int | None) -> int:
    if delay_slots is not None:
        return delay_slots
    following = bundles[branch + 1 : branch + 1 + isa.MOST_BRANCH_DELAY_SLOTS]
    for count, bundle in enumerate(following):
        if bundle.marker or bundle.starts_regions:
            return count
    return len(following)


def _or_exit(position: int, total: int) -> int:
    return position if position < total else EXIT


def static_loops(blocks: Mapping[int, Block]) -> list[StaticLoop]:
    """The loops, each with all that is inside it, in the order of their starts."""
    ends: dict[int, int] = {}
    for block in blocks.values():
        for following in block.successors:
            if following != EXIT and following <= block.start:
                ends[following] = max(ends.get(following, 0), block.end)
    return [StaticLoop(start, end) for start, end in sorted(ends.items())]

"""How many bundles the loops of a program have, and whether they fit."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.tpu_timing import control_flow
from benchmarks.tpu_timing.overlays import BUNDLE_BYTES
from benchmarks.tpu_timing.program import Program

# Bundles before and behind the loop that a whole program is.
MOST_AROUND_A_PROGRAM = 100


@dataclass(frozen=True)
class LoopSize:
    """A loop of a program.

    Attributes:
      start: First bundle of the program's listing.
      end: First bundle after the loop.
      bundles: Of the final listing, which are those that instruction memory holds. The
        program's own listing has more, since delays are not folded in it.
    """

    start: int
    end: int
    bundles: int

    def __str__(self) -> str:
        size = self.bundles * BUNDLE_BYTES / 1e6
        return (
            f"loop {self.start:#x}-{self.end:#x} of {self.bundles} bundles "
            f"({size:.1f} MB)"
        )


@dataclass(frozen=True)
class OversizeLoop:
    """A loop that instruction memory cannot hold.

    Attributes:
      loop: An innermost one of that kind.
      limit: Bundles that would fit.
    """

    loop: LoopSize
    limit: int

    def __str__(self) -> str:
        return (
            f"{self.loop} does not fit instruction memory, which takes {self.limit} "
            "bundles: instructions are fetched again in every iteration"
        )


def loop_sizes(program: Program) -> list[LoopSize]:
    """The loops of a program, run or not, the largest first.

    An outer loop has all that is inside it. A loop around the whole of a program is
    none of them: a kernel has it in order to be fetched at once, and runs it once.
    """
    addresses = program.final_addresses
    found = [
        LoopSize(loop.start, loop.end, int(addresses[loop.end] - addresses[loop.start]))
        for loop in control_flow.static_loops(program.blocks)
    ]
    found.sort(key=lambda loop: -loop.bundles)
    if len(found) > 1 and _is_whole_program(found[0], found[1:], int(addresses[-1])):
        del found[0]
    return found


def find_oversize_loops(program: Program) -> list[OversizeLoop]:
    """The innermost loops that do not fit instruction memory."""
    limit = program.overlay_sizes.jumbo
    large = [loop for loop in loop_sizes(program) if loop.bundles > limit]
    return [
        OversizeLoop(loop, limit)
        for loop in large
        if not any(_is_inside(other, loop) for other in large if other != loop)
    ]


def _is_inside(inner: LoopSize, outer: LoopSize) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end


def _is_whole_program(loop: LoopSize, others: list[LoopSize], bundles: int) -> bool:
    """Whether a loop has all others in it, and little of the program is outside."""
    is_around = all(_is_inside(other, loop) for other in others)
    return is_around and bundles - loop.bundles <= MOST_AROUND_A_PROGRAM

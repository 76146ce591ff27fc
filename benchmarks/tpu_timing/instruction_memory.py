"""Which overlays are in instruction memory, and what a jump to another one costs.

libtpu puts a routine before every program. This module does what its code does (the
compiler can dump it), with time added. A jump to another overlay

1. waits until the fetch in flight has arrived; there is never more than one;
2. looks for the overlay in a table, whose records lie in memory one after the other. If
   it is not there, it is fetched to the place behind the last record. If that has no
   room, or the table is full, it goes behind the overlay that it names for fetching in
   advance, if that is there, and all others behind that are forgotten. Otherwise the
   whole table is;
3. waits for that fetch;
4. fetches the overlay that the new one names, unless it is there, in the same way. If
   it fits nowhere, it may go before the new overlay, which is then forgotten though it
   goes on; or it is not fetched.

So nothing stays for being used often: memory is filled from its beginning until
something does not fit.
"""

from __future__ import annotations

from benchmarks.tpu_timing.dma import DmaEngine
from benchmarks.tpu_timing.overlays import OverlaidProgram

# The routine executes about so many branches in a jump, each with its delay slots.
JUMP_BRANCHES = 29


class InstructionMemory:
    """The state of instruction memory during one run.

    Attributes:
      fetches: Overlays that were fetched, by number.
    """

    def __init__(
        self, program: OverlaidProgram, dma: DmaEngine, branch_delay_slots: int
    ):
        self.fetches: dict[int, int] = {}
        self._program = program
        self._dma = dma
        self._jump_cycles = JUMP_BRANCHES * (1 + branch_delay_slots)
        self._table: list[int] = []  # numbers of overlays, in the order of addresses
        self._arrival = 0.0  # of what is in flight

    def hold(self, number: int) -> None:
        """Has an overlay there from the beginning, as an earlier run leaves it."""
        self._table = [number]

    def enter(self, now: float, number: int) -> float:
        """Jumps to an overlay; returns when its first bundle runs."""
        overlay = self._program.overlays[number]
        following = overlay.prefetch
        time = max(now + self._jump_cycles, self._arrival)
        if not self._place(time, number) and not self._place_behind(
            time, number, following
        ):
            self._table = []
            self._place(time, number)
        time = max(time, self._arrival)
        if following is not None:
            self._prefetch(time, following, number)
        return time

    def leave(self, now: float) -> float:
        """Ends the run; returns when what is in flight has arrived.

        The next jump waits for it, and so does the end of a program.
        """
        return max(now, self._arrival)

    def _prefetch(self, now: float, number: int, entered: int) -> None:
        if self._place(now, number) or self._place_behind(now, number, entered):
            return
        if self._granules(number) <= self._used(self._table.index(entered)):
            self._table = []
            self._place(now, number)

    def _place(self, now: float, number: int) -> bool:
        """Whether an overlay is there, or fits behind all others."""
        if number in self._table:
            return True
        is_full = len(self._table) == self._program.records
        if is_full or not self._fits(number, len(self._table)):
            return False
        self._table.append(number)
        self.fetches[number] = self.fetches.get(number, 0) + 1
        size = self._program.overlays[number].bytes
        self._arrival = self._dma.fetch_code(now, size)
        return True

    def _place_behind(self, now: float, number: int, kept: int | None) -> bool:
        """Whether an overlay fits in the place of all those behind a kept one."""
        if kept not in self._table[:-1]:
            return False
        count = self._table.index(kept) + 1
        if not self._fits(number, count):
            return False
        self._table = self._table[:count]
        return self._place(now, number)

    def _fits(self, number: int, count: int) -> bool:
        """Whether there is room behind the first so many records."""
        room = self._program.last_granule - self._program.first_granule
        return self._used(count) + self._granules(number) <= room

    def _used(self, count: int) -> int:
        return sum(map(self._granules, self._table[:count]))

    def _granules(self, number: int) -> int:
        return self._program.overlays[number].granules

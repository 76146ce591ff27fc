"""Timing of DMAs and synchronisation flags.

All transfers share one HBM channel and are served in issue order:

    start = max(issue, channel free)
    busy  = descriptor_cycles + max(bytes, min_bytes) / (efficiency * peak)
    flag  is incremented at start + busy + latency_cycles

so latency is paid per transfer but overlaps with other transfers. Transfers
that are cut into short contiguous pieces move at least `min_piece_bytes` per
piece. Transfers that do not touch HBM use the same latency but no HBM time.
Fetches of instructions are transfers like the others.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from jax_kernels.chips import Chip

# The direction of fetches of instructions.
CODE = "hbm_to_imem"


@dataclass(frozen=True)
class DmaModel:
    """The constants of the model; one published figure fixed them, see README."""

    latency_s: float = 1.0e-6  # from the end of the transfer to the flag being seen
    descriptor_s: float = 0.0  # channel time per transfer
    efficiency: float = 0.92  # attainable share of peak HBM bandwidth
    min_bytes: int = 512
    min_piece_bytes: int = 512
    free_spills: bool = False  # what if scalar spills to HBM took no time

    def __post_init__(self) -> None:
        if not 0 < self.efficiency <= 1:
            raise ValueError(
                f"efficiency: expected more than 0 and at most 1, got {self.efficiency}"
            )
        for name in ("latency_s", "descriptor_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}: expected at least 0, got {getattr(self, name)}"
                )


@dataclass
class Transfer:
    """One DMA of a run, times in cycles."""

    source: str
    target: str
    bytes: int
    issued: float
    started: float
    done: float


class SyncFlagDeadlock(Exception):
    """The program waits for a flag that nothing in flight will raise."""


class DmaEngine:
    """The state of the HBM channel and of all flags during one run."""

    def __init__(
        self, chip: Chip, model: DmaModel, granule_bytes: int, keep_transfers: bool
    ):
        self.model = model
        self.granule_bytes = granule_bytes
        self.latency = model.latency_s * chip.rates.clock_hz
        self.descriptor = model.descriptor_s * chip.rates.clock_hz
        self.bytes_per_cycle = model.efficiency * chip.rates.hbm_bytes_per_cycle
        self.channel_free = 0.0
        self.channel_busy = 0.0
        self.flags: dict[int, int] = {}
        self.parked: set[int] = set()  # last touched by an explicit set
        self.pending: dict[int, deque[tuple[float, int]]] = {}
        self.bytes_moved: dict[str, int] = {}
        self.count: dict[str, int] = {}
        self.last_done = 0.0
        self.wait_cycles = 0.0
        self.waits = 0
        self.stalled_waits = 0
        self.transfers: list[Transfer] | None = [] if keep_transfers else None

    def _occupy(self, now: float, num_bytes: float) -> tuple[float, float]:
        """When the channel takes up a transfer, and when that has arrived."""
        start = max(now, self.channel_free)
        busy = self.descriptor + num_bytes / self.bytes_per_cycle
        self.channel_free = start + busy
        self.channel_busy += busy
        return start, self.channel_free + self.latency

    def _count(self, direction: str, num_bytes: int) -> None:
        self.bytes_moved[direction] = self.bytes_moved.get(direction, 0) + num_bytes
        self.count[direction] = self.count.get(direction, 0) + 1

    def fetch_code(self, now: float, num_bytes: int) -> float:
        """Moves instructions to instruction memory; returns when they are there."""
        self._count(CODE, num_bytes)
        start, done = self._occupy(now, num_bytes)
        self.last_done = max(self.last_done, done)
        if self.transfers is not None:
            self.transfers.append(Transfer("hbm", "imem", num_bytes, now, start, done))
        return done

    def issue(
        self, now, source, target, granules, flag, piece_granules, is_spill=False
    ):
        nbytes = granules * self.granule_bytes
        self._count(f"{'spill_' if is_spill else ''}{source}_to_{target}", nbytes)
        start = now
        done = now + self.latency
        if granules > 0:
            if is_spill and self.model.free_spills:
                done = now
            elif "hbm" in (source, target):
                moved = max(nbytes, self.model.min_bytes)
                if piece_granules:
                    piece = piece_granules * self.granule_bytes
                    if piece < self.model.min_piece_bytes:
                        moved = max(moved, nbytes * self.model.min_piece_bytes / piece)
                start, done = self._occupy(now, moved)
            self.parked.discard(flag)
            self.pending.setdefault(flag, deque()).append((done, granules))
            self.last_done = max(self.last_done, done)
        if self.transfers is not None:
            self.transfers.append(Transfer(source, target, nbytes, now, start, done))

    def wait(self, now, flag, amount):
        """Time at which the flag has reached `amount`."""
        self.waits += 1
        value = self.flags.get(flag, 0)
        if value >= amount:
            return now
        queue = self.pending.get(flag)
        until = now
        while value < amount:
            if not queue:
                raise SyncFlagDeadlock(
                    f"flag {flag} holds {value}, waiting for {amount}, "
                    "nothing in flight"
                )
            done, granules = queue.popleft()
            value += granules
            until = max(until, done)
        self.flags[flag] = value
        if until > now:
            self.stalled_waits += 1
            self.wait_cycles += until - now
        return until

    def read(self, now, flag):
        value = self.flags.get(flag, 0)
        return value + sum(
            granules for done, granules in self.pending.get(flag, ()) if done <= now
        )

    def add(self, flag, amount):
        self.flags[flag] = self.flags.get(flag, 0) + amount

    def set(self, flag, amount):
        self.flags[flag] = amount
        self.parked.add(flag)

    def finish(self):
        """Applies everything still in flight; returns flags that are not zero.

        Flags that the program itself set to a value last (register spills park
        theirs at 1) are not counted.
        """
        for flag, queue in self.pending.items():
            self.flags[flag] = self.flags.get(flag, 0) + sum(g for _, g in queue)
            queue.clear()
        return {
            flag: value
            for flag, value in self.flags.items()
            if value and flag not in self.parked
        }

"""Whether a call updates its cache in place, or copies all of it.

An equal address of the buffer is not enough: a program may copy the whole cache and
write the copy back. So the same step is timed with a small cache and with a large one,
of which it uses no more. If the time that this adds is too short for a copy of what was
added, nothing was copied.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

import torch_rpa
from jax_kernels import chips
from torch_rpa import bridges, devices
from torch_rpa.bridges.lowering import Target
from torch_rpa.doctor import batches, checks, timing
from torch_rpa.doctor.checks import Check

NAME = "cache in place"
MIB = 1 << 20
REPEATS = 7
# Bytes of the large cache, by platform.
LARGE = {"tpu": 1024 * MIB, "cpu": 64 * MIB}
# In bytes per second: no memory of a host, or of a chip that is not known, is faster.
FASTEST = {"tpu": 10e12, "cpu": 0.5e12}
DTYPE = torch.bfloat16


class Growth(NamedTuple):
    """What a larger cache costs a step that uses no more of it.

    Attributes:
        small_seconds: Of a step with the small cache.
        large_seconds: With the large one.
        added_bytes: Of cache that no step uses.
        same_buffer: Whether the cache kept its address; None if the framework does not
            tell it.
    """

    small_seconds: float
    large_seconds: float
    added_bytes: int
    same_buffer: bool | None

    def is_copied(self, bytes_per_s: float) -> bool:
        """Whether the added time is enough to read and write what was added.

        Args:
            bytes_per_s: The peak of the memory.
        """
        added_seconds = self.large_seconds - self.small_seconds
        return added_seconds >= 2 * self.added_bytes / bytes_per_s


def check(device: torch.device, target: Target) -> Check:
    """Times steps with a small and a large cache on an open device."""
    page_bytes = batches.filled_cache(DTYPE, batches.NUM_PAGES)[0].nbytes
    sizes = batches.NUM_PAGES, LARGE[target.platform] // page_bytes
    small, large = (_step(device, num_pages) for num_pages in sizes)
    same = None if None in (small[1], large[1]) else bool(small[1] and large[1])
    added_bytes = (sizes[1] - sizes[0]) * page_bytes
    return verdict(Growth(small[0], large[0], added_bytes, same), target)


def _step(device: torch.device, num_pages: int) -> tuple[float, bool | None]:
    """Returns the seconds of a step, and whether its cache keeps its address."""
    bridge = bridges.find(device.type)
    assert bridge is not None, "the CPU is not timed"
    inputs = batches.moved(batches.make(batches.KINDS["decode"], DTYPE), device)
    # Made there: only some of its pages are ever read.
    kv_cache = torch_rpa.empty_kv_cache(
        num_pages,
        batches.PAGE_SIZE,
        batches.NUM_KV_HEADS,
        batches.HEAD_DIM,
        dtype=DTYPE,
        device=device,
    )
    tensors = inputs._replace(kv_cache=kv_cache)
    options = batches.options_of(DTYPE)
    devices.sync(device, wait=True)
    addresses = {bridge.buffer_address(kv_cache)}

    # The output is kept until the sync: so it is the program that numbers come from.
    outputs = []

    def run() -> None:
        outputs[:] = [torch_rpa.ragged_paged_attention(*tensors.positional, **options)]
        devices.sync(device)

    def finish() -> None:
        devices.sync(device, wait=True)

    seconds = timing.median_seconds(run, finish, repeats=REPEATS)
    addresses.add(bridge.buffer_address(kv_cache))
    return seconds, None if None in addresses else len(addresses) == 1


def verdict(growth: Growth, target: Target) -> Check:
    """Says whether the cache is copied, and whether that is as it should be.

    The plain computation that a CPU device runs copies it.
    """
    chip = chips.find_chip(target.chip)
    rates = chip.known_rates
    peak = FASTEST[target.platform] if rates is None else rates.hbm_bytes_per_s
    is_copied = growth.is_copied(peak)
    figures = growth._asdict() | {"is_copied": is_copied}
    buffer = {True: "kept its buffer", False: "changed its buffer", None: "not seen"}
    finding = (
        f"{growth.added_bytes / MIB:.0f} MiB more of cache add "
        f"{1e6 * (growth.large_seconds - growth.small_seconds):.0f} us to a step of "
        f"{1e6 * growth.small_seconds:.0f} us: the cache is "
        f"{'copied' if is_copied else 'not copied'} (address: "
        f"{buffer[growth.same_buffer]})"
    )
    if target.implementation != "pallas":
        return checks.ok(
            NAME, f"{finding}; on a CPU it may be, the kernel never does", **figures
        )
    if is_copied or growth.same_buffer is False:
        return checks.failed(
            NAME,
            finding,
            "give each layer a cache of its own, from torch_rpa.empty_kv_cache, and "
            "end each step with a sync; else " + checks.REPORT,
            **figures,
        )
    return checks.ok(NAME, finding, **figures)

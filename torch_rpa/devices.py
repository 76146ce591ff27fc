"""Devices that models run on: the CPU, and those that have a bridge.

What a model runner, a server or a command line needs to know of a device and of the
framework behind it, so that none of them names one::

    device = devices.open_device("xla")
    model.to(device)
    logits = model(...)
    devices.sync(device)  # starts the step where calls are only recorded
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from torch_rpa import bridges

CPU = "cpu"


def names() -> tuple[str, ...]:
    """Returns the device types that a model can run on, the CPU last."""
    return (*bridges.BRIDGES, CPU)


def usual_name() -> str:
    """Returns the first device type that can be used, else the CPU's.

    For that its framework must be installed and fit the installed torch. A framework
    that makes its device type known to torch only where it sees a device must see one.
    """
    for name, entry in bridges.BRIDGES.items():
        if entry.problem() is None and _is_known(name):
            return name
    return CPU


def _is_known(name: str) -> bool:
    """Whether torch knows a device type."""
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


def open_device(device: torch.device | str) -> torch.device:
    """Opens a device, and returns it as its tensors name it.

    To be called before anything imports JAX, so that JAX cannot take the device.

    Args:
        device: One of :func:`names`, with an index or without.

    Raises:
        ValueError: The device is none of these, its framework is not installed or does
            not fit the installed torch or sees no such device, or there is no device of
            that index.
    """
    name = str(device).partition(":")[0]
    if name not in names():
        *others, last = [repr(other) for other in names()]
        raise ValueError(
            f"device must be {', '.join(others)} or {last}, got {str(device)!r}"
        )
    entry = bridges.BRIDGES.get(name)
    problem = None if entry is None else entry.problem()
    if problem is not None:
        raise ValueError(f"device {name!r} needs {problem}; or use {usual_name()!r}")
    # The bridge first: some frameworks make their device known when they are imported.
    bridge = bridges.find(name)
    if entry is not None and not _is_known(name):
        raise ValueError(
            f"device {name!r} must be a device of this machine: {entry.framework} sees "
            f"none; use {usual_name()!r}"
        )
    wanted = torch.device(device)
    return wanted if bridge is None else bridge.open_device(wanted)


def sync(device: torch.device, *, wait: bool = False) -> None:
    """Starts all that is pending on a device; ``wait`` also waits for its end.

    On a lazy device it ends a program. Without it, reading a result would leave the
    updates of caches pending: they would join the next step's program and lose their
    buffers. Elsewhere there is nothing pending.
    """
    bridge = bridges.find(device.type)
    if bridge is not None:
        bridge.sync(wait=wait)


def is_compiled(device: torch.device) -> bool:
    """Whether each size of a step costs a compilation, so that few sizes are better.

    It is so for every device but the CPU: a bridge compiles for each shape.
    """
    return bridges.find(device.type) is not None


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Returns what to call on a device instead of a function of static shapes."""
    bridge = bridges.find(device.type)
    return function if bridge is None else bridge.compiled(function)


def num_compilations(device: torch.device) -> int:
    """Returns how many programs this process has compiled for a device so far."""
    bridge = bridges.find(device.type)
    return 0 if bridge is None else bridge.num_compilations()


def keep_programs(device: torch.device | str, directory: str | os.PathLike) -> None:
    """Keeps compiled programs on disk, so that a later process need not wait for them.

    To be called before models run on the device. Under torch_xla it needs a TPU; on the
    plain CPU there are no programs, and nothing happens.

    Args:
        device: One of :func:`names`.
        directory: Where to keep them. It is made if it is not there. Programs of other
            sizes, other models and other releases in it do no harm.

    Raises:
        NotImplementedError: The device cannot load programs.
        RuntimeError: Something was compiled already.
    """
    bridge = bridges.find(str(device).partition(":")[0])
    if bridge is not None:
        bridge.keep_programs(os.path.abspath(directory))
        os.makedirs(directory, exist_ok=True)


def multiply_in_float32(device: torch.device) -> None:
    """Makes products of float32 matrices on a device as exact as float32.

    A TPU multiplies them in bfloat16 otherwise. It holds until the process ends.
    """
    bridge = bridges.find(device.type)
    if bridge is not None:
        bridge.multiply_in_float32()

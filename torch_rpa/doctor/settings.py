"""Environment variables that keep a program from the TPU, or the TPU from its speed."""

from __future__ import annotations

from collections.abc import Iterator

from jax_kernels import chips
from torch_rpa.bridges import BRIDGES
from torch_rpa.doctor.checks import Check, ok, skipped, warning
from torch_rpa.doctor.installation import Installation


def device_check(installation: Installation, device_name: str) -> Check:
    """Whether the program runs on the TPU that the machine has.

    Args:
        installation: What is installed and set.
        device_name: The type of the device that is used.
    """
    name = "tpu"
    if not installation.has_tpu:
        return skipped(name, "this machine shows none; what needs one is skipped")
    entry = BRIDGES.get(device_name)
    if entry is None:
        others = " or ".join(BRIDGES)
        return warning(
            name, "there is one, but the device is the CPU", f"--device {others}"
        )
    variable = entry.platform_variable
    platform = installation.variables.get(variable or "", "TPU")
    if platform != "TPU":
        return warning(
            name,
            f"there is one, but {variable} is {platform}",
            f"export {variable}=TPU",
        )
    return ok(name, "this machine shows one")


def clock(installation: Installation) -> str:
    """Returns the clock that libtpu is told to hold, one of ``chips.CLOCKS``."""
    flags = installation.variables.get("LIBTPU_INIT_ARGS", "").split()
    return "highest" if chips.HIGHEST_CLOCK_FLAG in flags else "default"


def chip_checks(
    installation: Installation, platform: str, chip: str | None
) -> Iterator[Check]:
    """Yields what is to be said of the chip that was opened.

    Args:
        installation: What is installed and set.
        platform: ``"tpu"`` or ``"cpu"``.
        chip: Its short name; None if it is not known.
    """
    if platform != "tpu":
        return
    if chip is None:
        yield warning(
            "chip",
            "not known: the kernel uses limits that every chip meets, and is slower",
            "export TPU_ACCELERATOR_TYPE, such as v6e-1",
        )
        return
    if chip not in chips.COMPILED:
        yield warning(
            "chip",
            f"{chip}: the kernel was never compiled for it",
            f"use one of {', '.join(chips.COMPILED)}",
        )
        return
    yield ok("chip", chip)
    if chips.CHIPS[chip].rates.default_clock_hz is None:
        return
    if clock(installation) == "highest":
        yield ok("clock", "the highest one is held")
    else:
        yield warning(
            "clock",
            "not the highest one: steps bound by arithmetic take 1.2 times as long",
            f"export LIBTPU_INIT_ARGS={chips.HIGHEST_CLOCK_FLAG}",
        )

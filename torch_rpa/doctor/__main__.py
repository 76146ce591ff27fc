"""Command line: ``python -m torch_rpa.doctor --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from torch_rpa import bridges, devices
from torch_rpa.bridges.kernel_digest import kernel_digest
from torch_rpa.bridges.lowering import Target
from torch_rpa.doctor import (
    batches,
    checks,
    in_place,
    installation,
    numbers,
    report,
    settings,
    speed,
    steps,
    versions,
)
from torch_rpa.doctor.checks import Check, Status
from torch_rpa.doctor.installation import Installation

DESCRIPTION = """\
Checks an installation: versions and what fits what, the operator against its
reference, whether the cache is updated in place, and on a TPU the achieved bandwidth
and FLOPs beside what is predicted. Prints one line for each check, with the remedy.
What cannot be checked here is named as skipped.
"""
EPILOG = """\
exit status: 0 if no check failed, 1 if one did, 2 for wrong options
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.json is not None:
        if not args.json.parent.is_dir() or args.json.is_dir():
            parser.error(f"--json: expected a file in a folder, got {args.json}")
        args.json.unlink(missing_ok=True)  # an old one says nothing of this run
    found = installation.read()
    made: list[Check] = []
    device: dict[str, Any] = {"name": args.device, "kernel": kernel_digest()}

    def save(complete: bool) -> None:
        if args.json is not None:
            content = report.content(
                found, device, made, steps.read_predictions(), complete=complete
            )
            report.write(args.json, content)

    # A library that ends the process leaves a report of what came before.
    for check in _checks(args, found, device):
        print(check, flush=True)
        made.append(check)
        save(complete=False)
    save(complete=True)
    print(f"\n{summary(made)}")
    return checks.exit_status(made)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_rpa.doctor",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device",
        choices=devices.names(),
        help="to check; by default the first whose framework can be used",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write a report to attach"
    )
    parser.add_argument(
        "--quick", action="store_true", help="leave out all that is timed"
    )
    return parser


def summary(made: Sequence[Check]) -> str:
    """Returns the last line: how many checks ended how."""
    counts = {status: sum(c.status is status for c in made) for status in Status}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)


def _checks(
    args: argparse.Namespace, found: Installation, opened: dict[str, Any]
) -> Iterator[Check]:
    """Yields all checks, each as soon as it is made; fills in what was opened."""
    yield from versions.checks(found)
    name = args.device or devices.usual_name()
    opened["name"] = name
    yield settings.device_check(found, name)
    try:
        device = devices.open_device(name)
        bridge = bridges.find(device.type)
        target = Target("cpu", None, "eager")
        if bridge is not None:
            target = bridge.target(device)
    except Exception as error:
        yield checks.of_error(f"device {name}", error)
        return
    opened |= {
        "platform": target.platform,
        "chip": target.chip,
        "implementation": target.implementation,
        "clock": settings.clock(found),
    }
    yield checks.ok(f"device {name}", f"{device} was opened, {computed_by(target)}")
    yield from settings.chip_checks(found, target.platform, target.chip)
    yield from _number_checks(device)
    if target.platform != "tpu":
        yield checks.skipped(
            "kernel",
            "it runs on a TPU only: what was compared here is "
            f"{computed_by(target)}. The tests run the kernel in interpret mode",
        )
    yield from _timed_checks(args, found, device, target)


def computed_by(target: Target) -> str:
    """Says what computes the attention."""
    return {
        "pallas": "computed by the Pallas kernel",
        "reference": "the plain computation in jax.numpy",
        "eager": "the operator of CPU tensors",
    }[target.implementation]


def _number_checks(device: torch.device) -> Iterator[Check]:
    for dtype in batches.SCALES:
        for kind_name, kind in batches.KINDS.items():
            name = f"numbers, {kind_name}, {str(dtype).removeprefix('torch.')} cache"

            def check(name=name, kind=kind, dtype=dtype) -> Check:
                return numbers.check(name, kind, dtype, device)

            yield checks.guarded(name, check)


def _timed_checks(
    args: argparse.Namespace, found: Installation, device: torch.device, target: Target
) -> Iterator[Check]:
    """Yields what needs a device that is timed, or why it is not."""
    timed: dict[str, Callable[[], Check]] = {
        in_place.NAME: lambda: in_place.check(device, target)
    }
    for step in steps.STEPS:
        timed[f"speed, {step.words}"] = lambda step=step: speed.check(
            step, device, target.chip, settings.clock(found)
        )
    for name, check in timed.items():
        if args.quick:
            yield checks.skipped(name, "left out by --quick")
        elif target.implementation == "eager":
            yield checks.skipped(name, "CPU tensors are not timed")
        elif name != in_place.NAME and target.platform != "tpu":
            yield checks.skipped(name, "needs a TPU")
        else:
            yield checks.guarded(name, check)


if __name__ == "__main__":
    sys.exit(main())

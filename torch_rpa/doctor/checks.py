"""One check: what it found, and what to do about it."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Callable, Iterable
from typing import Any


class Status(enum.StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"  # could not be checked here


@dataclasses.dataclass(frozen=True)
class Check:
    """What one check says, on one line.

    Attributes:
        name: What was checked.
        status: How it ended.
        finding: What was seen.
        remedy: What to do about it, if anything.
        figures: Numbers behind the finding, for the report.
    """

    name: str
    status: Status
    finding: str
    remedy: str | None = None
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        remedy = f". Remedy: {self.remedy}" if self.remedy else ""
        return f"{self.status:<8} {self.name}: {self.finding}{remedy}"


def ok(name: str, finding: str, **figures: Any) -> Check:
    return Check(name, Status.OK, finding, figures=figures)


def warning(name: str, finding: str, remedy: str, **figures: Any) -> Check:
    return Check(name, Status.WARNING, finding, remedy, figures)


def failed(name: str, finding: str, remedy: str, **figures: Any) -> Check:
    return Check(name, Status.FAILED, finding, remedy, figures)


def skipped(name: str, finding: str, remedy: str | None = None) -> Check:
    return Check(name, Status.SKIPPED, finding, remedy)


# What is known of errors of other software, by a pattern of their text.
KNOWN_ERRORS = {
    r"Unsupported version: expected <= \d+ but got \d+": (
        "libtpu is too old for what this jax writes: "
        "pip install 'libtpu>=0.0.42,<=0.0.52'"
    ),
    r"Invalid TPU external name": (
        "libtpu does not know this chip: pip install 'libtpu>=0.0.42,<=0.0.52'"
    ),
    r"TPU is already in use|libtpu_lockfile|libtpu.so already in use": (
        "a TPU belongs to one process: end the other one, such as a notebook or a test"
    ),
    r"RESOURCE_EXHAUSTED|[Oo]ut of memory": (
        "end what else holds memory of the device, or run with --quick"
    ),
}
REPORT = "attach the file of --json to a report of the problem"


def remedy_for(text: str) -> str:
    """Returns what to do about an error of other software."""
    for pattern, remedy in KNOWN_ERRORS.items():
        if re.search(pattern, text):
            return remedy
    return REPORT


def of_error(name: str, error: Exception) -> Check:
    """Returns the check that an error ended."""
    text = " ".join(str(error).split()) or "no message"
    short = text if len(text) <= 300 else f"{text[:300]} ..."
    return failed(
        name, f"{type(error).__name__}: {short}", remedy_for(text), error=text[:4000]
    )


def guarded(name: str, function: Callable[[], Check]) -> Check:
    """Runs a check; an error is what it found, and does not end the others."""
    try:
        return function()
    except Exception as error:
        return of_error(name, error)


def exit_status(checks: Iterable[Check]) -> int:
    """Returns 1 if a check failed, else 0: warnings and skipped ones are no failure."""
    return int(any(check.status is Status.FAILED for check in checks))

"""The report as a file: what to attach, without paths or names of the machine."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch_rpa.doctor.checks import Check, exit_status
from torch_rpa.doctor.installation import Installation
from torch_rpa.doctor.steps import STEPS

FORMAT = 1
# An absolute path, but no part of an address in the web. Its last part stays.
_PATH = re.compile(r"(?<![\w./:~])(?:~|[A-Za-z]:)?/(?:[^\s/'\"<>|:,;=()]+/)+")
# Those whose values are names of files.
_FILES = ("TPU_LIBRARY_PATH", "TORCH_RPA_TUNED_BLOCK_SIZES")


def without_names(text: str, host: str | None = None) -> str:
    """Returns a text whose paths are cut to their last part, without the host's name.

    Args:
        text: Anything, such as the message of an error.
        host: The name of the machine, by default that of this one.
    """
    host = socket.gethostname() if host is None else host
    text = _PATH.sub(".../", text)
    if host and host != "localhost":
        text = re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", "HOST", text)
    return text


def content(
    installation: Installation,
    device: dict[str, Any],
    checks: Sequence[Check],
    predictions: dict[str, Any],
    *,
    complete: bool,
) -> dict[str, Any]:
    """Returns the report.

    Args:
        installation: What is installed and set.
        device: What was opened, with the digest of the kernel.
        checks: As far as they were made.
        predictions: Those that measured times are compared with.
        complete: Whether all checks were made.
    """
    variables = {
        name: "set" if name in _FILES else value
        for name, value in installation.variables.items()
    }
    return _cleaned(
        {
            "kind": "torch_rpa.doctor",
            "format": FORMAT,
            "complete": complete,
            "exit_status": exit_status(checks),
            "installation": {
                **dataclasses.asdict(installation),
                "variables": variables,
            },
            "device": device,
            "checks": [dataclasses.asdict(check) for check in checks],
            "predictions": predictions,
            "steps": {step.name: step.words for step in STEPS},
        }
    )


def _cleaned(value: Any) -> Any:
    """Returns a value of JSON without names, and without numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _cleaned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return without_names(value) if isinstance(value, str) else value


def write(path: Path, report: dict[str, Any]) -> None:
    """Writes a report, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", "utf-8")
    part.replace(path)

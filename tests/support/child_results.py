"""Results of cases that have processes of their own; needs neither JAX nor PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def print_result(result: dict[str, Any]) -> None:
    """Prints what a case gives, for ``result_of`` in another process."""
    print("\nRESULT " + json.dumps(result), flush=True)


def result_of(module: str, case: str, **environment: str) -> dict[str, Any]:
    """Runs a case of a module in a process of its own, and returns what it prints."""
    child = subprocess.run(
        [sys.executable, "-m", module, case],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    marked = [x for x in child.stdout.splitlines() if x.startswith("RESULT ")]
    assert marked, (child.stdout + child.stderr)[-5000:]
    return json.loads(marked[-1].removeprefix("RESULT "))

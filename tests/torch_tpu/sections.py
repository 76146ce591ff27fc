"""Cases of a child process on a compile-only TPU, told apart in its record.

The child runs :func:`run_cases`, which marks where each case starts: it copies a tensor
to the device whose length nothing else has. The test reads the events of a case with
:class:`Sections`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tests.support import compile_only_tpu

MARK = 30_011  # bytes of the first mark


def run_cases(cases: dict[str, Callable[[], Any]], names: Sequence[str]) -> None:
    """Runs cases, each after its mark, and prints their results as JSON."""
    import torch

    results = {}
    for name in names:
        num_bytes = MARK + list(cases).index(name)
        torch.zeros(num_bytes, dtype=torch.uint8).to("tpu").cpu()
        results[name] = cases[name]()
        torch.accelerator.synchronize()
    print(json.dumps(results))


class Sections:
    """What a child process compiled, ran and copied, by case.

    Attributes:
        results: What each case returned.
        dump: The record of the process.
    """

    def __init__(
        self,
        chip: str,
        directory: Any,
        module: str,
        cases: Sequence[str],
        all_cases: Iterable[str],
        **variables: str,
    ) -> None:
        """Runs the cases of a module in a child process."""
        completed = compile_only_tpu.run(
            chip, directory, "-m", module, *cases, variables=variables
        )
        self.results: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
        self.dump = compile_only_tpu.Dump(directory)
        self._all = list(all_cases)

    def events(self, case: str) -> list[dict[str, Any]]:
        """What happened in a case."""
        marks = {
            event["bytes"] - MARK: index
            for index, event in enumerate(self.dump.events)
            if event["event"] == "copy_to_device"
            and MARK <= event["bytes"] < MARK + len(self._all)
        }
        start = marks[self._all.index(case)]
        end = min((m for m in marks.values() if m > start), default=None)
        inside = self.dump.events[start + 1 : end]
        read_back = self.dump.events[start]["bytes"]
        return [e for e in inside if e.get("bytes") != read_back]

    def programs(self, case: str) -> list[compile_only_tpu.CompiledProgram]:
        """The programs that a case compiled."""
        kinds = ("compile", "load")
        numbers = {e["program"] for e in self.events(case) if e["event"] in kinds}
        return [p for p in self.dump.programs() if p.number in numbers]

    def kernel_programs(self, case: str) -> list[compile_only_tpu.CompiledProgram]:
        """Those that call the kernel."""
        return [p for p in self.programs(case) if p.hlo.kernel_calls]

    def count(self, case: str, kind: str) -> int:
        """How many events of a kind a case has."""
        return sum(event["event"] == kind for event in self.events(case))

"""Reads the text of a program that the TPU compiler has optimised."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

# Operations that give an array of their operand, without a copy.
PASSING_ON = frozenset({"parameter", "get-tuple-element", "bitcast"})


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of optimised HLO, fused computations included.

    Attributes:
      name: The opcode, or the target of a custom call.
      result_type: Type and layout.
      text: The line.
    """

    name: str
    result_type: str
    text: str


class OptimisedHlo:
    """A program.

    Attributes:
      text: All of it.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    @property
    def aliases(self) -> dict[int, int]:
        """The parameter whose memory each output takes over."""
        header = self.text.split("\n", 1)[0]
        found = re.search(r"input_output_alias={(.*?) }, entry", header)
        if found is None:
            return {}
        pairs = re.findall(r"{(\d*)}: \((\d+), {}, \w+-alias\)", found.group(1))
        return {int(output or 0): int(parameter) for output, parameter in pairs}

    @property
    def num_aliased_parameters(self) -> int:
        """Parameters whose buffer an output takes over."""
        return len(self.aliases)

    @property
    def kernel_calls(self) -> list[str]:
        """The lines that call a Pallas kernel."""
        return [line for line in self.text.splitlines() if "tpu_custom_call" in line]

    @property
    def collectives(self) -> dict[str, list[str]]:
        """The operations between devices, by kind: the shapes of their results."""
        pattern = re.compile(
            r"= (.*?) ((?:all-|reduce-scatter|collective-)[\w\-]*?)(?:-start)?\("
        )
        found: dict[str, list[str]] = {}
        for match in filter(None, map(pattern.search, self.text.splitlines())):
            if not match.group(2).endswith("-done"):
                found.setdefault(match.group(2), []).append(match.group(1))
        return found

    def operations(self) -> Iterator[Operation]:
        """All operations but parameters."""
        # "%name = type opcode(operands), ..."; the type may be a tuple.
        pattern = re.compile(r"^\s*(?:ROOT )?%\S+ = (\(.*?\)|\S+) ([\w\-]+)\(")
        for line in self.text.splitlines():
            match = pattern.match(line)
            if match is None or match.group(2) == "parameter":
                continue
            result_type, name = match.groups()
            if name == "custom-call":
                (name,) = re.findall(r'custom_call_target="([^"]*)"', line)
            yield Operation(name, result_type, line.strip())

    def operations_producing(self, shape: str) -> list[str]:
        """Names of the operations, fused ones too, whose result has this shape.

        Args:
          shape: Such as "bf16[64,4,4,2,128]".
        """
        pattern = re.compile(rf"= {re.escape(shape)}\S* ([\w\-]+)\(")
        return [m.group(1) for m in map(pattern.search, self.text.splitlines()) if m]

    def copies_of(self, shape: str) -> list[str]:
        """Names of the operations that write a new array of this shape.

        A kernel that returns the array in the memory of its argument gives a tuple, so
        it is none of them.

        Args:
          shape: Such as "bf16[64,4,4,2,128]".
        """
        return [
            name for name in self.operations_producing(shape) if name not in PASSING_ON
        ]

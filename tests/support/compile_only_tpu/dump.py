"""Reads what a process with a compile-only TPU has recorded."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

from tests.support.optimised_hlo import OptimisedHlo


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A program that was compiled, or loaded from a cache on disk.

    Attributes:
      number: In the order of compilation.
      name: That TorchTPU gave it, such as ``"tt_jit_mm"``.
      loaded: Whether it was serialised by a former process.
      topology: What it was compiled for at first, such as ``"v6e:1x1x1"``.
      results: Types of its results, such as ``"bf16[8,128]"``.
      milliseconds: That compilation took.
    """

    number: int
    name: str
    loaded: bool
    topology: str
    results: tuple[str, ...]
    milliseconds: int
    _directory: pathlib.Path = dataclasses.field(repr=False)

    def _read(self, suffix: str) -> bytes:
        return (self._directory / f"program-{self.number:04}.{suffix}").read_bytes()

    @functools.cached_property
    def hlo(self) -> OptimisedHlo:
        """What the compiler made of it."""
        from jaxlib import _hlo  # pyright: ignore[reportAttributeAccessIssue]

        module = _hlo.HloModule.from_serialized_hlo_module_proto(self._read("hlo"))
        return OptimisedHlo(module.to_string())

    @functools.cached_property
    def stablehlo(self) -> str:
        """What the compiler was given."""
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import stablehlo

        with ir.Context() as context:
            stablehlo.register_dialect(context)
            return str(
                stablehlo.deserialize_portable_artifact(context, self._read("source"))
            )

    @functools.cached_property
    def options(self) -> Any:
        """Compile options, as jaxlib's ``CompileOptions``."""
        from jaxlib import xla_client

        return xla_client.CompileOptions.ParseFromString(self._read("options"))

    def aliases(self) -> dict[int, int]:
        """The parameter whose memory each output takes over."""
        return self.hlo.aliases

    def copies_of(self, shape: str) -> list[str]:
        """Names of the operations that write a new array of a shape."""
        return self.hlo.copies_of(shape)


@dataclasses.dataclass(frozen=True)
class Execution:
    """A call of a program. Buffers are numbers, each used once in a process.

    Attributes:
      program: Number of the program.
      device: Id of the device.
      arguments: Buffers.
      results: Buffers.
      donated: Those of the arguments that are gone after it.
      bytes_in_use: Memory of the device's buffers after it.
    """

    program: int
    device: int
    arguments: tuple[int, ...]
    results: tuple[int, ...]
    donated: tuple[int, ...]
    bytes_in_use: int


class Dump:
    """The record of one process.

    Attributes:
      directory: That holds it.
      events: What happened, in order. Beside what ``programs`` and ``executions`` give
        there are ``copy_to_device`` and ``copy_to_host``: ``buffer`` and ``bytes``.
    """

    def __init__(self, directory: pathlib.Path | str) -> None:
        self.directory = pathlib.Path(directory)
        lines = (self.directory / "events.jsonl").read_text().splitlines()
        self.events: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def programs(self, name: str | None = None) -> list[CompiledProgram]:
        """All programs, compiled and loaded ones, or those of a name."""
        programs = [
            CompiledProgram(
                number=event["program"],
                name=event["name"],
                loaded=event["event"] == "load",
                topology=event["topology"],
                results=tuple(event["results"]),
                milliseconds=event["milliseconds"],
                _directory=self.directory,
            )
            for event in self.events
            if event["event"] in ("compile", "load")
        ]
        return [p for p in programs if name is None or p.name == name]

    def executions(self, program: CompiledProgram | None = None) -> list[Execution]:
        """All executions, or those of a program."""
        return [
            Execution(
                program=event["program"],
                device=event["device"],
                arguments=tuple(event["arguments"]),
                results=tuple(event["results"]),
                donated=tuple(event["donated"]),
                bytes_in_use=event["bytes_in_use"],
            )
            for event in self.events
            if event["event"] == "execute"
            and (program is None or event["program"] == program.number)
        ]

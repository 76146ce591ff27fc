"""What XLA puts around a kernel: operations of a program, and the bytes they move.

Of the text of an optimised program, every operation counts that reads or writes memory
beside the kernel: conversions, copies, pads, transposes and fusions of them. A model
may have them fused into what makes the queries, so this is the most that they cost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_DTYPE_BITS = {
    "pred": 8,
    **{f"{kind}{bits}": bits for kind in "su" for bits in (4, 8, 16, 32, 64)},
    **{"bf16": 16, "f16": 16, "f32": 32, "f64": 64},
}
# Other names for the same bytes, and what starts or awaits a prefetch of an operand of
# the kernel, which would have to read it anyway.
_FREE = frozenset(
    {"parameter", "constant", "bitcast", "get-tuple-element", "tuple"}
    | {"copy-start", "copy-done", "slice-start", "slice-done", "ConcatBitcast"}
    | {"tpu_custom_call"}
)
_ENTRY = re.compile(r"^ENTRY .*?^}", re.MULTILINE | re.DOTALL)
# "%name = type opcode(operands), ..."; the type may be a tuple.
_LINE = re.compile(r"^\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:,|$)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


@dataclass(frozen=True)
class Operation:
    """One operation of a program beside the kernel.

    Attributes:
      name: The opcode, or the target of a custom call.
      bytes: That it reads from and writes to HBM, with the padding of tiles.
    """

    name: str
    bytes: float


def operations(text: str) -> Iterator[Operation]:
    """What a program does beside its kernel.

    Args:
      text: Optimised HLO.

    Raises:
      ValueError: It has no entry computation.
    """
    entry = _ENTRY.search(text)
    if entry is None:
        raise ValueError(f"expected the text of optimised HLO, got {text[:80]!r}")
    sizes: dict[str, float] = {}
    for line in entry.group().splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        result, array_type, name, operands = match.groups()
        sizes[result] = _hbm_bytes(array_type)
        if name == "custom-call":
            name = "".join(_TARGET.findall(line))
        if name not in _FREE:
            read = re.findall(r"%([^\s,)]+)", operands)
            yield Operation(name, sizes[result] + sum(sizes[n] for n in read))


def bytes_around(text: str) -> float:
    """Bytes that a program moves beside its kernel, see ``operations``."""
    return sum(operation.bytes for operation in operations(text))


def _hbm_bytes(array_type: str) -> float:
    """Of all arrays of a type that are in HBM."""
    return sum(_array_bytes(*match) for match in _ARRAY.findall(array_type) if match[0])


def _array_bytes(dtype: str, sizes: str, order: str, tiling: str) -> float:
    if "S(" in tiling:  # in another memory than HBM
        return 0
    bits = 8 if dtype.startswith("f8") else _DTYPE_BITS.get(dtype, 32)
    lengths = [int(size) for size in sizes.split(",") if size]
    minor_to_major = [int(axis) for axis in order.split(",") if axis]
    physical = [lengths[axis] for axis in reversed(minor_to_major)] or lengths
    tile = re.match(r"T\(([\d,]+)\)", tiling)
    if tile:
        parts = [int(part) for part in tile.group(1).split(",")]
        for place in range(-1, -1 - min(len(parts), len(physical)), -1):
            physical[place] = -(-physical[place] // parts[place]) * parts[place]
    return math.prod(physical) * bits / 8

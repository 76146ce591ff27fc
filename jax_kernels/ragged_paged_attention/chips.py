"""What the kernel needs to know of a chip. Passed in as a value, never looked up."""

import dataclasses

MIB = 1024 * 1024
E4M3FN_BIAS = 7


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TensorCore.

    Attributes:
      name: Short name, such as ``"v6e"``.
      vmem_bytes: Vector memory.
      matrix_columns: Width of a matrix unit.
      smem_bytes: Scalar memory.
      multiplies_float8: Whether matrix units take float8 beside bfloat16 as it is.
      e4m3_bias: Exponent bias of the e4m3 that it multiplies, or widens.
      rounds_to_e4m3fn: Whether an instruction rounds float32 to it.
      adds_in_16_bits: Whether the vector unit adds bfloat16 and int16.
    """

    name: str
    vmem_bytes: int
    matrix_columns: int = 256
    smem_bytes: int = MIB
    multiplies_float8: bool = False
    e4m3_bias: int = E4M3FN_BIAS
    rounds_to_e4m3fn: bool = False
    adds_in_16_bits: bool = False


V5E = Chip("v5e", vmem_bytes=128 * MIB, matrix_columns=128, e4m3_bias=11)
V6E = Chip(
    "v6e",
    vmem_bytes=128 * MIB,
    multiplies_float8=True,
    e4m3_bias=11,
    adds_in_16_bits=True,
)
TPU7X = Chip(
    "tpu7x",
    vmem_bytes=64 * MIB,
    multiplies_float8=True,
    rounds_to_e4m3fn=True,
    adds_in_16_bits=True,
)
# Small enough for every chip since v4.
UNKNOWN = Chip("unknown", vmem_bytes=32 * MIB)

_BY_NAME = {
    "v5e": V5E,
    "v5litepod": V5E,
    "tpu v5 lite": V5E,
    "tpu v5e": V5E,
    "v6e": V6E,
    "tpu v6 lite": V6E,
    "tpu v6e": V6E,
    "tpu7x": TPU7X,
    "v7x": TPU7X,
    "tpu7": TPU7X,
}


def find_chip(name: str | None) -> Chip:
    """The chip of a short name (``"v6e"``) or of a device kind (``"TPU v6 lite"``).

    A name that is not known gives limits that every chip meets: slower than
    possible, but never out of memory.
    """
    return UNKNOWN if name is None else _BY_NAME.get(name.lower(), UNKNOWN)

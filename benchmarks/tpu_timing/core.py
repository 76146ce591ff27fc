"""How a TensorCore issues instructions: what compiled schedules show of each chip."""

from __future__ import annotations

from benchmarks.tpu_timing.overlays import OverlaySizes
from jax_kernels.chips import Chip

# Bundles executed after every branch, by chip. They are inferred from the program of a
# chip that is missing here.
BRANCH_DELAY_SLOTS = {"tpu7x": 6, "v6e": 4, "v5e": 4}

# What libtpu's log says of each chip. Instruction memory has 65,536 bundles on all of
# them, of which the jump routine takes some.
OVERLAY_SIZES = {
    "tpu7x": OverlaySizes(21680, 65056),
    "v6e": OverlaySizes(21720, 65168),
    "v5e": OverlaySizes(21744, 65232),
}
LEAST_OVERLAY_SIZES = OVERLAY_SIZES["tpu7x"]

# Cycles one vmatmul keeps its MXU busy, by the MXU's width and the type named in the
# mnemonic. These are the smallest spacings the compiler's own scheduler uses.
_VMATMUL_CYCLES = {
    256: {"bf16": 8, "f32": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8},
    128: {"bf16": 16, "f32": 8, "s8": 16, "u8": 16},
}


def vmatmul_cycles(chip: Chip) -> dict[str, int]:
    """Cycles that one vmatmul of each type keeps its MXU busy."""
    return _VMATMUL_CYCLES[chip.matrix_columns]

"""The TPU chips: their names, memories, matrix units, dtypes, rates and topologies.

All that the project knows of a chip is in its one entry here. Only what compiled
programs show of its instructions is kept beside the timing model, which reads them
(``benchmarks/tpu_timing/core.py``). A chip is passed in as a value: no device is ever
asked. The module needs neither JAX nor torch.
"""

from __future__ import annotations

import dataclasses
import re

MIB = 1024 * 1024
E4M3FN_BIAS = 7
# In LIBTPU_INIT_ARGS: TPU7x holds its highest clock. Other chips have one clock only.
HIGHEST_CLOCK_FLAG = "--xla_tpu_dvfs_p_state=7"
CLOCKS = ("highest", "default")


@dataclasses.dataclass(frozen=True)
class Rates:
    """Peaks of one TensorCore and its share of HBM.

    Attributes:
      clock_hz: Of the TensorCore, at its highest. Peaks are meant with it.
      hbm_bytes_per_s: Of memory, whose clock is another.
      bf16_flops_per_cycle: Of all matrix units, in bfloat16.
      default_clock_hz: Of the TensorCore under load, where libtpu is not told to hold
        the highest clock (``HIGHEST_CLOCK_FLAG``); None if it does so untold.
    """

    clock_hz: float
    hbm_bytes_per_s: float
    bf16_flops_per_cycle: int
    default_clock_hz: float | None = None

    @property
    def hbm_bytes_per_cycle(self) -> float:
        return self.hbm_bytes_per_s / self.clock_hz

    @property
    def bf16_flops_per_s(self) -> float:
        return self.bf16_flops_per_cycle * self.clock_hz

    def seconds(self, cycles: float) -> float:
        return cycles / self.clock_hz

    def at_default_clock(self) -> Rates:
        """The rates of a TensorCore that is not told to hold its highest clock."""
        return dataclasses.replace(
            self, clock_hz=self.default_clock_hz or self.clock_hz, default_clock_hz=None
        )


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TensorCore.

    Attributes:
      name: Short name, such as ``"v6e"``.
      vmem_bytes: Vector memory.
      matrix_columns: Width, and depth, of a matrix unit.
      smem_bytes: Scalar memory.
      multiplies_float8: Whether float8 is always left to matrix units as it is, beside
        bfloat16. Those of v5e take their own e4m3 as well, which is used in decode.
      e4m3_bias: Exponent bias of the e4m3 that it multiplies, or widens.
      rounds_to_e4m3fn: Whether an instruction rounds float32 to it.
      adds_in_16_bits: Whether the vector unit adds bfloat16 and int16.
      device_kind: As PJRT reports it, which is how JAX names a chip; None if unknown.
      other_names: Beside ``name``, in lower case: device kinds, also of other releases,
        and accelerator types, as Google Cloud has them, without the number of chips.
      known_topology: What ``topology`` returns.
      known_rates: What ``rates`` returns.
    """

    name: str
    vmem_bytes: int
    matrix_columns: int = 256
    smem_bytes: int = MIB
    multiplies_float8: bool = False
    e4m3_bias: int = E4M3FN_BIAS
    rounds_to_e4m3fn: bool = False
    adds_in_16_bits: bool = False
    device_kind: str | None = None
    other_names: tuple[str, ...] = ()
    known_topology: str | None = None
    known_rates: Rates | None = None

    @property
    def topology(self) -> str:
        """A small slice of such chips by the name that libtpu gives it.

        It can be compiled for without a TPU.

        Raises:
          NotImplementedError: Nothing is compiled for this chip.
        """
        if self.known_topology is None:
            raise NotImplementedError(
                f"chip: expected one that is compiled for ({', '.join(COMPILED)}), "
                f"got {self.name}"
            )
        return self.known_topology

    def at_clock(self, clock: str) -> Chip:
        """The same chip with the rates of a clock.

        Args:
          clock: One of ``CLOCKS``: ``"highest"``, or ``"default"``, that of a
            TensorCore under load where libtpu is not told to hold the highest one.

        Raises:
          ValueError: No such clock.
          NotImplementedError: The rates of the chip are not known.
        """
        if clock not in CLOCKS:
            raise ValueError(f"clock: expected one of {CLOCKS}, got {clock!r}")
        if clock == "highest" or self.rates.default_clock_hz is None:
            return self
        return dataclasses.replace(self, known_rates=self.rates.at_default_clock())

    @property
    def rates(self) -> Rates:
        """Peak rates.

        Raises:
          NotImplementedError: They are not known of this chip.
        """
        if self.known_rates is None:
            raise NotImplementedError(
                f"chip: expected one whose rates are known ({', '.join(COMPILED)}), "
                f"got {self.name}"
            )
        return self.known_rates


V5E = Chip(
    "v5e",
    vmem_bytes=128 * MIB,
    matrix_columns=128,
    e4m3_bias=11,
    device_kind="TPU v5 lite",
    other_names=("tpu v5 lite", "tpu v5e", "v5litepod"),
    known_topology="v5e:2x2",
    known_rates=Rates(1.5e9, 0.82e12, 131072),
)
V6E = Chip(
    "v6e",
    vmem_bytes=128 * MIB,
    multiplies_float8=True,
    e4m3_bias=11,
    adds_in_16_bits=True,
    device_kind="TPU v6 lite",
    other_names=("tpu v6 lite", "tpu v6e"),
    known_topology="v6e:2x2",
    known_rates=Rates(1.755e9, 1.64e12, 524288),
)
TPU7X = Chip(
    "tpu7x",
    vmem_bytes=64 * MIB,
    multiplies_float8=True,
    rounds_to_e4m3fn=True,
    adds_in_16_bits=True,
    device_kind="TPU7x",
    other_names=("tpu7", "tpu v7", "tpu v7x", "v7x"),
    known_topology="tpu7x:2x2x1",
    # A product of two 8192 x 8192 matrices of bfloat16 was measured at 93.7 % of the
    # peak with HIGHEST_CLOCK_FLAG and at 76.3 % without it, on one chip by one author
    # (github.com/yangwhale/gpu-tpu-pedia, 2026-02): 2.2 GHz * 76.3 / 93.7.
    known_rates=Rates(2.2e9, 3.69e12, 524288, default_clock_hz=1.79e9),
)
# Small enough for every chip since v4.
UNKNOWN = Chip("unknown", vmem_bytes=32 * MIB)
# Chips that the kernel was never compiled for have a name, and the limits of UNKNOWN.
V4 = dataclasses.replace(
    UNKNOWN, name="v4", device_kind="TPU v4", other_names=("tpu v4",)
)
V5P = dataclasses.replace(
    UNKNOWN, name="v5p", device_kind="TPU v5", other_names=("tpu v5", "tpu v5p")
)

CHIPS = {chip.name: chip for chip in (TPU7X, V6E, V5E, V5P, V4)}
# Those whose topology and rates are known: what the kernel is compiled and timed for.
COMPILED = {
    name: chip for name, chip in CHIPS.items() if chip.known_topology is not None
}

# What libtpu has to be told, before it is loaded, where there is no TPU: to ask no
# metadata server, and that several processes may load it. Any accelerator type will do,
# because the topology decides what is compiled for.
COMPILE_ONLY_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

_SHORT_NAMES = {
    other: chip.name for chip in CHIPS.values() for other in chip.other_names
}


def short_name(name: str | None) -> str | None:
    """The short name of a known chip, or None.

    Args:
      name: A short name (``"v5e"``), a device kind of PJRT (``"TPU v5 lite"``) or an
        accelerator type (``"v5litepod-8"``), in upper or lower case.
    """
    if name is None:
        return None
    without_number = re.sub(r"-\d+$", "", name.strip().lower())
    if without_number in CHIPS:
        return without_number
    return _SHORT_NAMES.get(without_number)


def find_chip(name: str | None) -> Chip:
    """The chip of a name that ``short_name`` knows.

    A name that is not known gives limits that every chip meets: slower than
    possible, but never out of memory.
    """
    found = short_name(name)
    return UNKNOWN if found is None else CHIPS[found]

"""Block sizes that were tuned, looked up by shape. Pure values, no hardware.

``tuned_block_sizes.json`` beside this file is written by ``python -m benchmarks.tune``.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from jax_kernels.contract.cache import ITEMSIZES

DATA_FILE = Path(__file__).with_name("tuned_block_sizes.json")
# What a record says of each phase; the mixed loop has the blocks of prefill.
PHASES = {
    "decode": ("decode_block_kv",),
    "prefill": ("block_q", "block_kv"),
}
# How many doublings a shape may be away from a tuned one, in each respect. A window is
# comparable to a window only, and nothing to a shape on another chip.
MAX_DOUBLINGS = {
    "group": 1.0,
    "num_kv_heads": 1.0,
    "head_dim": 1.0,
    "cache_bytes": 1.0,
    "page_size": 3.0,
    "sliding_window": 1.0,
}
# Of another dtype of the same size: e4m3 is preferred to e5m2 for e4m3, no more.
OTHER_DTYPE = 0.25


@dataclasses.dataclass(frozen=True)
class TunedShape:
    """What block sizes are tuned for.

    Attributes:
      q_dtype: Name of the dtype of queries, keys and values.
      cache_dtype: Name of the dtype of the cache.
      num_q_heads: Hq.
      num_kv_heads: Hkv.
      head_dim: D.
      page_size: Tokens in a page.
      sliding_window: Positions that a query sees, or None for all.
    """

    q_dtype: str
    cache_dtype: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    sliding_window: int | None = None

    def __post_init__(self):
        for name in ("q_dtype", "cache_dtype"):
            if getattr(self, name) not in ITEMSIZES:
                raise ValueError(
                    f"{name}: expected one of {', '.join(ITEMSIZES)}, got "
                    f"{getattr(self, name)!r}"
                )

    @property
    def group(self) -> int:
        """Query heads per key head (G)."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def cache_bytes(self) -> int:
        """Of one element of the cache."""
        return ITEMSIZES[self.cache_dtype]

    def __str__(self) -> str:
        window = f", window {self.sliding_window}" if self.sliding_window else ""
        return (
            f"{self.num_q_heads}/{self.num_kv_heads} heads of {self.head_dim}, "
            f"{self.q_dtype} queries, {self.cache_dtype} cache, page {self.page_size}"
            f"{window}"
        )


@dataclasses.dataclass(frozen=True)
class TunedBlocks:
    """One record of the file.

    Attributes:
      chip: Short name, as in ``chips.py``.
      phase: A key of ``PHASES``.
      shape: What was tuned.
      blocks: The best sizes of the phase, by the names of ``BlockSizes``.
      default_blocks: The sizes that the cost model gives.
      kind: "prediction" or "measurement".
      cycles: Of each step of the workload, in cycles of the chip's clock.
      default_cycles: The same with the default sizes.
      versions: Date, commit and package versions.
    """

    chip: str
    phase: str
    shape: TunedShape
    blocks: Mapping[str, int]
    default_blocks: Mapping[str, int]
    kind: str
    cycles: Mapping[str, int]
    default_cycles: Mapping[str, int]
    versions: Mapping[str, str]

    def __post_init__(self):
        if self.phase not in PHASES:
            raise ValueError(f"phase: expected one of {set(PHASES)}, got {self.phase}")
        for field in ("blocks", "default_blocks"):
            blocks = getattr(self, field)
            if set(blocks) != set(PHASES[self.phase]):
                raise ValueError(
                    f"{field}: expected {PHASES[self.phase]} for {self.phase}, got "
                    f"{tuple(blocks)}"
                )
            for name, size in blocks.items():
                if not isinstance(size, int) or size < 1 or size.bit_count() != 1:
                    raise ValueError(f"{name}: expected a power of two, got {size!r}")
        if self.kind not in ("prediction", "measurement"):
            raise ValueError(
                f"kind: expected prediction or measurement, got {self.kind!r}"
            )
        if set(self.cycles) != set(self.default_cycles) or not self.cycles:
            raise ValueError(
                f"cycles: expected the steps of default_cycles, "
                f"{tuple(self.default_cycles)}, got {tuple(self.cycles)}"
            )

    @property
    def key(self) -> tuple:
        """A file has one record for each."""
        return (self.chip, self.phase, *dataclasses.astuple(self.shape))

    def carried_over(self, model: Mapping[str, int]) -> dict[str, int]:
        """Sizes for another shape, for which the cost model gives ``model``.

        What was learned is how far the best sizes are from the cost model's, which
        already scales with group size and bytes of a token.
        """
        return {
            name: max(1, model[name] * size // self.default_blocks[name])
            for name, size in self.blocks.items()
        }

    @property
    def speedup(self) -> float:
        """Over the cost model's sizes; geometric mean over the workload's steps."""
        ratios = [self.default_cycles[step] / self.cycles[step] for step in self.cycles]
        return math.prod(ratios) ** (1 / len(ratios))


def distance(shape: TunedShape, other: TunedShape) -> float:
    """Doublings between two shapes, summed over what ``MAX_DOUBLINGS`` names.

    Infinite where one of them is too many, where queries differ in dtype, and between
    a window and none.
    """
    if shape.q_dtype != other.q_dtype:
        return math.inf
    total = OTHER_DTYPE * (shape.cache_dtype != other.cache_dtype)
    for name, limit in MAX_DOUBLINGS.items():
        mine, others = getattr(shape, name), getattr(other, name)
        if mine == others:
            continue
        if mine is None or others is None:
            return math.inf
        doublings = abs(math.log2(mine / others))
        if doublings > limit:
            return math.inf
        total += doublings
    return total


def find(
    records: Iterable[TunedBlocks], chip: str, phase: str, shape: TunedShape
) -> tuple[TunedBlocks, float] | None:
    """The nearest record of a chip and phase and its distance, if one is near enough.

    Of equally near records, the first.
    """
    near = [
        (distance(shape, record.shape), index, record)
        for index, record in enumerate(records)
        if record.chip == chip and record.phase == phase
    ]
    if not near or math.isinf(min(near)[0]):
        return None
    found = min(near)
    return found[2], found[0]


def parse(text: str) -> tuple[TunedBlocks, ...]:
    """The records of a file.

    Raises:
      ValueError: A field is missing, unknown or not valid, or a key comes twice.
    """
    records = []
    for number, entry in enumerate(json.loads(text)["records"]):
        try:
            shape = TunedShape(**entry["shape"])
            records.append(TunedBlocks(**{**entry, "shape": shape}))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"record {number} of {DATA_FILE.name}: {error}") from error
    keys = [record.key for record in records]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ValueError(f"{DATA_FILE.name}: expected each key once, got {twice} twice")
    return tuple(records)


def as_text(records: Iterable[TunedBlocks]) -> str:
    """What ``parse`` reads, sorted, one record per line."""
    ordered = sorted(records, key=lambda record: str(record.key))
    lines = ",\n".join(json.dumps(dataclasses.asdict(record)) for record in ordered)
    return '{"records": [\n' + lines + "\n]}\n"


@functools.cache
def shipped() -> tuple[TunedBlocks, ...]:
    """The records of this package, read once."""
    return parse(DATA_FILE.read_text())

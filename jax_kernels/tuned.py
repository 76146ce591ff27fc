"""Block sizes that were tuned, looked up by shape. Pure values, without JAX.

``tuned_block_sizes.json`` beside this file is written by ``python -m benchmarks.tune``.
Users keep files of their own in the same format, from the same command or from
measurements. Their records go ahead of those that the package ships, in a block of
``applied`` or where the environment variable ``TORCH_RPA_TUNED_BLOCK_SIZES`` names
them::

    records = tuned.merge(tuned.read("new.json"), tuned.read("mine.json"))
    tuned.save("mine.json", records)
    with tuned.applied("mine.json"):
        ...  # what is traced or lowered here takes its block sizes from mine.json
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from jax_kernels.contract.cache import ITEMSIZES

ENVIRONMENT_VARIABLE = "TORCH_RPA_TUNED_BLOCK_SIZES"
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


def parse(text: str, name: str = DATA_FILE.name) -> tuple[TunedBlocks, ...]:
    """The records of a file.

    Args:
      text: What the file holds.
      name: Of the file, for errors.

    Raises:
      ValueError: The text is no such file, a field is missing, unknown or not valid, or
        a key comes twice.
    """
    try:
        entries = list(json.loads(text)["records"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'{name}: expected JSON like {{"records": [...]}}, got {text[:40]!r}'
        ) from error
    records = []
    for number, entry in enumerate(entries):
        try:
            shape = TunedShape(**entry["shape"])
            records.append(TunedBlocks(**{**entry, "shape": shape}))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"record {number} of {name}: {error}") from error
    keys = [record.key for record in records]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise ValueError(f"{name}: expected each key once, got {twice} twice")
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


def read(path: str | os.PathLike[str]) -> tuple[TunedBlocks, ...]:
    """The records of a file that a user keeps.

    Raises:
      OSError: The file cannot be read.
      ValueError: See ``parse``.
    """
    return parse(Path(path).read_text(encoding="utf-8"), str(path))


def save(path: str | os.PathLike[str], records: Iterable[TunedBlocks]) -> None:
    """Writes a file that ``read`` reads; a former one is replaced as a whole.

    Raises:
      ValueError: A key comes twice.
    """
    text = as_text(records)
    parse(text, str(path))
    whole = Path(path).with_name(Path(path).name + ".part")
    whole.write_text(text, encoding="utf-8")
    whole.replace(path)


def merge(*groups: Iterable[TunedBlocks]) -> tuple[TunedBlocks, ...]:
    """All records of the groups; of those with one key, that of the first group."""
    merged: dict[tuple, TunedBlocks] = {}
    for group in groups:
        for record in group:
            merged.setdefault(record.key, record)
    return tuple(merged.values())


@dataclasses.dataclass(frozen=True)
class _Users:
    """Records that users have put ahead of the shipped ones.

    Attributes:
      records: In order of precedence.
      token: The same for the same records, and "" for none.
    """

    records: tuple[TunedBlocks, ...] = ()

    @functools.cached_property
    def token(self) -> str:
        if not self.records:
            return ""
        text = as_text(self.records) + str([str(r.key) for r in self.records])
        return hashlib.sha256(text.encode()).hexdigest()


_lock = threading.Lock()
_users: _Users | None = None  # None: the environment has not been read yet


def _current() -> _Users:
    global _users
    if _users is None:
        paths = os.environ.get(ENVIRONMENT_VARIABLE, "").split(os.pathsep)
        _users = _Users(merge(*(read(path) for path in paths if path)))
    return _users


@contextlib.contextmanager
def applied(
    *sources: str | os.PathLike[str] | Iterable[TunedBlocks],
) -> Iterator[None]:
    """Puts records ahead of those in force so far, until the block ends.

    Of equally near records, that of the first source is taken. It holds for the whole
    process, all threads, and only for what is traced or lowered in the block: a program
    that exists keeps its block sizes. Blocks may be nested, the innermost goes first.

    Args:
      sources: Files, or records. None of them: no effect.

    Raises:
      OSError: A file cannot be read.
      ValueError: A file holds something else; see ``parse``.
    """
    global _users
    groups = [
        read(source) if isinstance(source, str | os.PathLike) else tuple(source)
        for source in sources
    ]
    with _lock:
        former = _current()
        _users = _Users(merge(*groups, former.records))
    try:
        yield
    finally:
        with _lock:
            _users = former


def in_force() -> tuple[TunedBlocks, ...]:
    """The records that block sizes are looked up in: those of users, then the shipped.

    Users' records come from blocks of ``applied`` and from the files that the
    environment variable ``TORCH_RPA_TUNED_BLOCK_SIZES`` names, separated like those of
    ``PATH``. It is read once, when block sizes are first looked up.

    Raises:
      OSError: A file that the environment names cannot be read.
      ValueError: Such a file holds something else.
    """
    return merge(_current().records, shipped())


def token() -> str:
    """What users' records are in force: equal for equal records, "" for none.

    A part of the key of whatever keeps programs with block sizes in them.
    """
    return _current().token

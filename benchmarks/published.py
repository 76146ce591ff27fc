"""Published times of attention kernels on TPUs, as data: ``published.toml``.

Predictions are compared with these times. A cell says what was computed, how long it
took, by whom and where that is published, and what had to be inferred. No figure in it
is this project's own.

The keys of a row of the file, each of which a table gives for all its rows as well:

* ``lengths``: of the sequences of a call, as ``workloads.parse_sequences`` reads them.
  Or ``chunked``: one fresh sequence of ``tokens``, in calls of ``chunk`` tokens each,
  whose times are summed;
* ``ms``, ``us`` or ``tflops``: the published figure, in its published digits;
* ``also_tflops``, ``also_tb_per_s``: what is published of the same time beside it;
* ``num_q_heads``, ``num_kv_heads``, ``head_dim``, ``v_head_dim`` (``head_dim`` unless
  given), ``dtype``, ``causal``, ``window``, ``page_size`` (none if there are no pages);
* ``blocks``: block sizes in the order of ``[kernels]``, or ``blocks_are``: why not;
* ``unusable``: why the cell cannot be compared with a prediction.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from benchmarks.tpu_timing import workloads
from benchmarks.tpu_timing.workloads import Sequence

FILE = Path(__file__).with_suffix(".toml")

# Of a call, below which its start and the launch of the kernel are a large share.
SHORT_MICROSECONDS = 100
# Steps of so few new tokens a sequence are bound by memory, as those of one are.
DECODE_QUERIES = 8
ITEM_BYTES = {"bfloat16": 2}

STATED = "stated"
OWN_CHOICE = "the kernel's own choice"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where times are published.

    Attributes:
      author: Who measured them.
      document: What they are in, with its commit where it has one.
      address: Of the document.
      date: Of the measurement or of its publication, as far as stated.
      method: What was timed, and how.
      clock: Whether libtpu was told to keep TPU7x at its highest clock
        (``--xla_tpu_dvfs_p_state=7``): ``"locked"``; was not: ``"default"``; or
        ``"not stated"``.
      versions: Of packages, as far as stated.
      inferred: What is not stated and was concluded.
      includes_transposes: Whether the times hold, beside the kernel, operations that
        transpose q, k, v and the output.
      keeps_values_in_vmem: Whether the transposed values go to vector memory, where the
        kernel finds them.
      unusable: As in ``Cell``, of all cells.
    """

    author: str
    document: str
    address: str
    date: str
    method: str
    clock: Literal["locked", "default", "not stated"]
    versions: dict[str, str]
    inferred: tuple[str, ...]
    includes_transposes: bool = False
    keeps_values_in_vmem: bool = False
    unusable: str | None = None


@dataclasses.dataclass(frozen=True)
class Figure:
    """A published number.

    Attributes:
      text: Its digits, such as ``"0.58"``.
      unit: ``"ms"``, ``"us"``, ``"tflops"`` (10^12 operations per second) or
        ``"tb_per_s"`` (10^12 bytes per second).
    """

    text: str
    unit: str

    @property
    def value(self) -> float:
        return float(self.text)

    @property
    def interval(self) -> tuple[float, float]:
        """What it may have been rounded from."""
        half = 0.5 * 10.0 ** -len(self.text.partition(".")[2])
        return self.value - half, self.value + half


@dataclasses.dataclass(frozen=True)
class Cell:
    """One published time, of one TensorCore.

    Attributes:
      name: Unique.
      kernel: ``"rpa_v3"``, ``"splash"`` or ``"flywheel"``.
      chip: As in ``jax_kernels.chips``.
      num_q_heads, num_kv_heads, head_dim, v_head_dim, dtype, causal, window: What was
        computed. The window is that of the last query: it sees so many keys.
      page_size: Tokens of a page; None for a kernel without pages.
      steps: Sequences of each call; the published time is that of all calls together.
      blocks: Block sizes by name; None if they are not stated.
      blocks_are: ``STATED``, ``OWN_CHOICE`` or why they are unknown.
      figure: The published number.
      also: Others that are published of the same time.
      source: Where.
      unusable: Why the cell cannot be compared with a prediction; None if it can.
      held_back: Whether it is kept from a fit, to test it.
    """

    name: str
    kernel: str
    chip: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str
    causal: bool
    window: int | None
    page_size: int | None
    steps: tuple[tuple[Sequence, ...], ...]
    blocks: dict[str, int | str] | None
    blocks_are: str
    figure: Figure
    also: tuple[Figure, ...]
    source: Source
    unusable: str | None = None
    held_back: bool = False

    @property
    def half_square_operations(self) -> float:
        """Operations as publications count them: a causal mask halves a square.

        Two for each multiplication and addition of the two matrix products.
        """
        pairs = sum(
            s.q_len * (s.kv_len - s.q_len / 2 if self.causal else s.kv_len)
            for step in self.steps
            for s in step
        )
        return 2 * pairs * self.num_q_heads * (self.head_dim + self.v_head_dim)

    @property
    def cache_bytes(self) -> float:
        """Keys and values of all sequences, once in each call."""
        tokens = sum(s.kv_len for step in self.steps for s in step)
        width = self.num_kv_heads * (self.head_dim + self.v_head_dim)
        return tokens * width * ITEM_BYTES[self.dtype]

    @property
    def transposed_bytes(self) -> float:
        """What the operations around the kernel read from HBM and write to it.

        0 if there are none.
        """
        if not self.source.includes_transposes:
            return 0
        queries = sum(s.q_len for step in self.steps for s in step)
        outputs = queries * self.num_q_heads * (self.head_dim + self.v_head_dim)
        moved = 2 * (outputs * ITEM_BYTES[self.dtype] + self.cache_bytes)
        if self.source.keeps_values_in_vmem:
            width = self.head_dim + self.v_head_dim
            moved -= self.cache_bytes * self.v_head_dim / width
        return moved

    @property
    def microseconds(self) -> float:
        """Published time of all calls together."""
        return self._microseconds(self.figure.value)

    @property
    def microseconds_interval(self) -> tuple[float, float]:
        """What the published number may have been rounded from, as a time."""
        first, last = sorted(map(self._microseconds, self.figure.interval))
        return first, last

    def _microseconds(self, value: float) -> float:
        if self.figure.unit == "tflops":
            return self.half_square_operations / (value * 1e12) * 1e6
        return value * {"ms": 1e3, "us": 1.0}[self.figure.unit]

    @property
    def kind(self) -> str:
        """See ``kind_of``; the time is that of one call."""
        sequences = [s for step in self.steps for s in step]
        return kind_of(self.microseconds / len(self.steps), sequences, self.head_dim)

    @property
    def program_known(self) -> bool:
        """Whether the blocks are stated, or follow from the kernel."""
        return self.blocks_are in (STATED, OWN_CHOICE)


def kind_of(microseconds: float, sequences: Iterable[Sequence], head_dim: int) -> str:
    """``"short"``, ``"decode"``, or ``"prefill-D"`` with D the head dimension.

    Args:
      microseconds: Of a call.
      sequences: Of the call.
      head_dim: Of keys.
    """
    if microseconds < SHORT_MICROSECONDS:
        return "short"
    if all(s.q_len <= DECODE_QUERIES for s in sequences):
        return "decode"
    return f"prefill-{head_dim}"


@functools.lru_cache(maxsize=1)
def cells() -> tuple[Cell, ...]:
    """All cells, in the order of the file.

    Of the usable cells of a kernel, chip and kind the second of every three is held
    back, whatever the times are.

    Raises:
      ValueError: The file has a key or a source that is not known, or a row without a
        figure.
    """
    content = tomllib.loads(FILE.read_text())
    sources = {
        name: Source(**{**given, "inferred": tuple(given["inferred"])})
        for name, given in content["sources"].items()
    }
    read = [
        _cell({**table, **row}, sources, content["kernels"])
        for table in content["tables"]
        for row in table.pop("rows")
    ]
    return tuple(_holding_back(read))


def usable_cells() -> tuple[Cell, ...]:
    """Those that can be compared with a prediction."""
    return tuple(cell for cell in cells() if cell.unusable is None)


def _holding_back(read: Iterable[Cell]) -> Iterator[Cell]:
    counts: dict[tuple[str, str, str], int] = {}
    for cell in read:
        stratum = cell.kernel, cell.chip, cell.kind
        seen = counts.get(stratum, 0)
        usable = cell.unusable is None
        counts[stratum] = seen + usable
        yield dataclasses.replace(cell, held_back=usable and seen % 3 == 1)


def _cell(
    row: dict[str, Any], sources: dict[str, Source], kernels: dict[str, Any]
) -> Cell:
    source_name = row.pop("source")
    if source_name not in sources:
        raise ValueError(f"source: expected one of {[*sources]}, got {source_name!r}")
    source = sources[source_name]
    figures = {unit: row.pop(unit) for unit in ("ms", "us", "tflops") if unit in row}
    if len(figures) != 1:
        raise ValueError(f"expected one of ms, us and tflops, got {figures} in {row}")
    ((unit, text),) = figures.items()
    also = tuple(
        Figure(row.pop(key), key.removeprefix("also_"))
        for key in ("also_tflops", "also_tb_per_s")
        if key in row
    )
    steps, lengths = _steps(row)
    sizes = row.pop("blocks", None)
    blocks = sizes and dict(zip(kernels[row["kernel"]]["blocks"], sizes, strict=True))
    shape = {
        "v_head_dim": row["head_dim"],
        "dtype": "bfloat16",
        "causal": True,
        "window": None,
        "page_size": None,
        "blocks_are": STATED,
        "unusable": source.unusable,
        **row,
    }
    return Cell(
        name=_name(source_name, shape, lengths, blocks),
        steps=steps,
        blocks=blocks,
        figure=Figure(text, unit),
        also=also,
        source=source,
        **shape,
    )


def _steps(row: dict[str, Any]) -> tuple[tuple[tuple[Sequence, ...], ...], str]:
    """The calls of a row, and their lengths in words."""
    if "chunked" in row:
        tokens, chunk = (row["chunked"][key] for key in ("tokens", "chunk"))
        del row["chunked"]
        ends = range(chunk, tokens + 1, chunk)
        return tuple((Sequence(chunk, end),) for end in ends), f"{tokens} by {chunk}"
    lengths = row.pop("lengths")
    return (tuple(workloads.parse_sequences(lengths)),), lengths


def _name(
    source: str, shape: dict[str, Any], lengths: str, blocks: dict[str, Any] | None
) -> str:
    widths = {shape["head_dim"]: None, shape["v_head_dim"]: None}
    heads = (
        f"{shape['num_q_heads']}/{shape['num_kv_heads']}x{'-'.join(map(str, widths))}"
    )
    parts = [
        shape["kernel"],
        shape["chip"],
        heads,
        *([] if shape["causal"] else ["full"]),
        *([f"window {shape['window']}"] if shape["window"] else []),
        lengths,
        *([] if blocks or shape["blocks_are"] == OWN_CHOICE else ["unknown blocks"]),
    ]
    return f"{' '.join(parts)} ({source})"

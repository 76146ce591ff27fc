"""The steps that are timed, what each needs at least, and how long it is predicted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jax_kernels.chips import Chip

PREDICTIONS = Path(__file__).with_name("predictions.json")
ITEMSIZES = {"bfloat16": 2, "float8_e4m3fn": 1}
QUERY_BYTES = 2  # bfloat16


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of Llama 3 8B, which is a case of that name in ``benchmarks.cases``.

    Attributes:
        name: Of the case.
        words: What it is.
        lengths: Sequences, as ``(count, new tokens, all tokens)``, decodes first.
        num_tokens: T.
        num_sequences: S.
        pages_per_sequence: P.
        cache_dtype: Name of the dtype.
        num_heads: Query heads.
        num_kv_heads: Key heads.
        head_dim: Elements of a head.
        page_size: Tokens of a page.
    """

    name: str
    words: str
    lengths: tuple[tuple[int, int, int], ...]
    num_tokens: int
    num_sequences: int
    pages_per_sequence: int
    cache_dtype: str = "bfloat16"
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 128

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """``(new tokens, all tokens)`` of each sequence."""
        return [(new, all_) for count, new, all_ in self.lengths for _ in range(count)]

    @property
    def num_pages(self) -> int:
        """The pages that the sequences have."""
        return sum(-(-all_ // self.page_size) for _, all_ in self.sequences)

    @property
    def needed_bytes(self) -> int:
        """Keys and values of all tokens, new ones written, queries and outputs."""
        token = 2 * self.num_kv_heads * self.head_dim * ITEMSIZES[self.cache_dtype]
        query = 2 * self.num_heads * self.head_dim * QUERY_BYTES
        return sum(new * (token + query) + all_ * token for new, all_ in self.sequences)

    @property
    def needed_flops(self) -> int:
        """Both products, of each query with the keys that a causal mask shows it."""
        pairs = sum(
            new * (all_ - new) + new * (new + 1) // 2 for new, all_ in self.sequences
        )
        return 4 * self.num_heads * self.head_dim * pairs

    @property
    def is_bound_by_memory(self) -> bool:
        """Whether bandwidth is what its speed is told by."""
        return all(new == 1 for _, new, _ in self.lengths)

    def bound_microseconds(self, chip: Chip) -> float:
        """Returns the least time that the peaks of a chip allow.

        The peak of arithmetic is that of heads that fill a side of the matrix unit.
        """
        rates, cap = chip.rates, min(1.0, self.head_dim / chip.matrix_columns)
        memory = self.needed_bytes / rates.hbm_bytes_per_s
        arithmetic = self.needed_flops / (rates.bf16_flops_per_s * cap)
        return 1e6 * max(memory, arithmetic)


_SERVER: dict[str, Any] = {
    "num_tokens": 128,
    "num_sequences": 128,
    "pages_per_sequence": 128,
}
STEPS = (
    Step(
        "llama-decode-128x8k",
        "decode of 128 sequences at 8K, bfloat16 cache",
        ((128, 1, 8192),),
        **_SERVER,
    ),
    Step(
        "llama-decode-fp8-128x8k",
        "decode of 128 sequences at 8K, float8 cache",
        ((128, 1, 8192),),
        **_SERVER,
        cache_dtype="float8_e4m3fn",
    ),
    Step(
        "llama-prefill-2k-at-8k",
        "prefill of the last 2K of 8K tokens",
        ((1, 2048, 8192),),
        num_tokens=2048,
        num_sequences=8,
        pages_per_sequence=64,
    ),
    Step(
        "llama-mixed-64x2k-2k-at-8k",
        "64 decodes at 2K with the last 2K of 8K tokens",
        ((64, 1, 2048), (1, 2048, 8192)),
        num_tokens=64 + 2048,
        num_sequences=72,
        pages_per_sequence=64,
    ),
)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """How long a step is predicted to take on a chip.

    Attributes:
        microseconds: At the clock that was asked for.
        low, high: Where a measured time is expected, as multiples of it.
    """

    microseconds: float
    low: float
    high: float


def read_predictions() -> dict[str, Any]:
    """Returns the content of the file, as ``benchmarks.predict --doctor`` writes it."""
    return json.loads(PREDICTIONS.read_text("utf-8"))


def prediction(step: Step, chip: str | None, clock: str) -> Prediction | None:
    """Returns what is predicted of a step, or None if nothing is.

    Args:
        step: One of ``STEPS``.
        chip: A short name, or None if it is not known.
        clock: One of ``chips.CLOCKS``.
    """
    of_chip = read_predictions()["chips"].get(chip, {"cases": {}})["cases"]
    record = of_chip.get(step.name)
    if record is None:
        return None
    microseconds: float = record["microseconds"]
    if clock == "default":
        microseconds = record["default_clock_microseconds"] or microseconds
    low, high = record["expected"]
    return Prediction(microseconds, low, high)

"""Ragged-paged-attention workloads: operand values, ideal bytes and FLOPs.

The model of what a workload needs, which MBU and MFU are shares of:

* bytes: queries read, outputs written, new keys and values written, once each; and of
  each sequence the keys and values of the positions that some query sees, read once.
* FLOPs: 4 D for each query head and each (query, visible key) pair.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from benchmarks.tpu_timing.dma import DmaModel
from jax_kernels.chips import Chip


@dataclass(frozen=True)
class Sequence:
    """One sequence of a step.

    Attributes:
      q_len: New tokens.
      kv_len: All tokens, the new ones included.
    """

    q_len: int
    kv_len: int


@dataclass(frozen=True)
class RpaShape:
    """Static sizes of a call; values are as wide as keys without ``v_head_dim``."""

    max_seqs: int
    pages_per_seq: int
    num_pages: int
    page_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    q_bytes: float
    kv_bytes: float
    v_head_dim: int | None = None

    @property
    def kv_width(self) -> int:
        """Elements of a key and a value together."""
        return self.head_dim + (self.v_head_dim or self.head_dim)

    @property
    def kv_token_bytes(self) -> float:
        """Keys and values of one token."""
        return self.num_kv_heads * self.kv_width * self.kv_bytes

    @property
    def q_token_bytes(self) -> float:
        return self.num_q_heads * self.head_dim * self.q_bytes

    @property
    def output_token_bytes(self) -> float:
        return self.num_q_heads * (self.v_head_dim or self.head_dim) * self.q_bytes


def page_table(shape: RpaShape, sequences: list[Sequence], seed: int = 0) -> np.ndarray:
    """Random page numbers [S, P]; none twice while the cache has enough pages."""
    rng = np.random.default_rng(seed)
    table = np.zeros((shape.max_seqs, shape.pages_per_seq), np.int32)
    used = [-(-s.kv_len // shape.page_size) for s in sequences]
    total = sum(used)
    if max(used, default=0) > shape.pages_per_seq:
        raise ValueError(
            f"a sequence needs {max(used)} pages, got {shape.pages_per_seq=}"
        )
    if total <= shape.num_pages:
        pages = rng.permutation(shape.num_pages)[:total]
    else:
        pages = rng.integers(0, shape.num_pages, total)
    start = 0
    for row, count in enumerate(used):
        table[row, :count] = pages[start : start + count]
        start += count
    return table


def scalar_operands(
    shape: RpaShape,
    sequences: list[Sequence],
    *,
    chunked: bool = False,
    decode_q_len: int = 1,
    seed: int = 0,
) -> dict[int, np.ndarray]:
    """The first four operands of the kernel, by index.

    They are kv_lens [S], page_indices [S * P], cu_q_lens [S + 1] and distribution [3].

    Args:
      shape: Static sizes.
      sequences: Those with up to ``decode_q_len`` new tokens first: the decodes.
      chunked: The others all have the kernel's chunk size of new tokens.
      decode_q_len: Most new tokens of a decode.
      seed: Of the page table.
    """
    if len(sequences) > shape.max_seqs:
        raise ValueError(
            f"{len(sequences)} sequences, the kernel takes {shape.max_seqs}"
        )
    is_decode = [s.q_len <= decode_q_len for s in sequences]
    if is_decode != sorted(is_decode, reverse=True):
        raise ValueError(f"sequences with q_len up to {decode_q_len} must come first")
    kv_lens = np.zeros(shape.max_seqs, np.int32)
    kv_lens[: len(sequences)] = [s.kv_len for s in sequences]
    starts = np.zeros(shape.max_seqs + 1, np.int32)
    starts[1 : len(sequences) + 1] = np.cumsum([s.q_len for s in sequences])
    starts[len(sequences) + 1 :] = starts[len(sequences)]
    num_decodes = sum(is_decode)
    middle = len(sequences) if chunked else num_decodes
    return {
        0: kv_lens,
        1: page_table(shape, sequences, seed).ravel(),
        2: starts,
        3: np.array([num_decodes, middle, len(sequences)], np.int32),
    }


@dataclass(frozen=True)
class Ideal:
    """What the workload needs at least: every byte moved once, masked pairs skipped."""

    read_bytes: float
    write_bytes: float
    kv_read_bytes: float
    flops: float
    unmasked_flops: float  # as if every query saw every key

    @property
    def bytes(self) -> float:
        return self.read_bytes + self.write_bytes


def visible_tokens(sequence: Sequence, window: int | None) -> int:
    """Positions of a sequence that some query of it sees.

    The first query has position ``kv_len - q_len`` and sees ``window`` positions that
    end there; later queries see the rest, with a causal mask and without.
    """
    if window is None or sequence.q_len == 0:
        return sequence.kv_len if sequence.q_len else 0
    return min(sequence.kv_len, sequence.q_len + window - 1)


def visible_pairs(sequence: Sequence, window: int | None, causal: bool) -> int:
    """(query, key) pairs that attend, summed over the queries."""
    positions = np.arange(sequence.kv_len - sequence.q_len, sequence.kv_len)
    last = positions if causal else np.full_like(positions, sequence.kv_len - 1)
    first = np.zeros_like(positions) if window is None else positions - window + 1
    return int(np.sum(last - np.maximum(first, 0) + 1))


def ideal(
    shape: RpaShape,
    sequences: list[Sequence],
    causal: bool = True,
    window: int | None = None,
    writes_cache: bool = True,
) -> Ideal:
    """Bytes and FLOPs that the step needs; see the module docstring.

    Without ``writes_cache`` new keys and values are read but stored nowhere.
    """
    kv_tokens = sum(visible_tokens(s, window) for s in sequences)
    q_tokens = sum(s.q_len for s in sequences)
    pairs = sum(visible_pairs(s, window, causal) for s in sequences)
    all_pairs = sum(s.q_len * s.kv_len for s in sequences)
    per_pair = 2 * shape.num_q_heads * shape.kv_width
    written = shape.output_token_bytes + (shape.kv_token_bytes if writes_cache else 0)
    kv_read_bytes = kv_tokens * shape.kv_token_bytes
    return Ideal(
        read_bytes=kv_read_bytes + q_tokens * shape.q_token_bytes,
        write_bytes=q_tokens * written,
        kv_read_bytes=kv_read_bytes,
        flops=per_pair * pairs,
        unmasked_flops=per_pair * all_pairs,
    )


def attention_cap(head_dim: int, chip: Chip) -> float:
    """Share of peak FLOPs that attention can reach: D fills a side of the MXU.

    Scores sum over D, and values are D wide, so a unit wider than D is idle in part.
    """
    return min(1.0, head_dim / chip.matrix_columns)


def bound_seconds(needed: Ideal, chip: Chip, cap: float) -> float:
    """The least time of a workload that the model of time can give.

    Either all bytes at the share of the peak bandwidth that copies reach, or all
    operations at the share ``cap`` of the peak that the head dimension allows. The peak
    is that of bfloat16, which a step that multiplies float8 may exceed.
    """
    bytes_per_s = chip.rates.hbm_bytes_per_s * DmaModel().efficiency
    flops_per_s = chip.rates.bf16_flops_per_s * cap
    return max(needed.bytes / bytes_per_s, needed.flops / flops_per_s)


def utilization(seconds: float, chip: Chip, needed: Ideal) -> dict[str, float]:
    """Shares of the chip's peaks that a time means for a workload."""
    peak_bytes = chip.rates.hbm_bytes_per_s * seconds
    peak_flops = chip.rates.bf16_flops_per_s * seconds
    bytes_s = needed.bytes / chip.rates.hbm_bytes_per_s
    flops_s = needed.flops / chip.rates.bf16_flops_per_s
    return {
        "mbu": needed.bytes / peak_bytes,
        "mbu_kv_only": needed.kv_read_bytes / peak_bytes,
        "mfu": needed.flops / peak_flops,
        "mfu_unmasked": needed.unmasked_flops / peak_flops,
        "ideal_microseconds": 1e6 * max(bytes_s, flops_s),
    }


def parse_sequences(text: str) -> list[Sequence]:
    """'128*1/8192,2*512/4096': 128 sequences q 1 kv 8192, then 2 of q 512 kv 4096."""
    sequences = []
    for part in text.split(","):
        match = re.fullmatch(r"(?:(\d+)\*)?(\d+)/(\d+)", part.strip())
        if not match:
            raise ValueError(f"sequences: expected [count*]q_len/kv_len, got {part!r}")
        count, q_len, kv_len = match.groups()
        if not 0 < int(q_len) <= int(kv_len):
            raise ValueError(f"sequences: expected 0 < q_len <= kv_len, got {part!r}")
        sequences += [Sequence(int(q_len), int(kv_len))] * int(count or 1)
    return sequences

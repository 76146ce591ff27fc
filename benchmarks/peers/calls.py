"""Calls of other kernels: what is computed, and by which of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import compiler
from benchmarks.tpu_timing import workloads
from benchmarks.tpu_timing.workloads import Sequence
from jax_kernels import chips
from jax_kernels.contract.cache import ITEMSIZES

SCRIPTS = Path(__file__).parent
DEFAULT_PAGE_SIZE = 128


@dataclasses.dataclass(frozen=True)
class Peer:
    """A kernel of others.

    Attributes:
      name: Of its environment.
      kernel: Of its script ``compile_KERNEL.py``, which may serve several releases;
        ``name`` if None.
      is_paged: Whether keys and values are always in pages. Such a kernel also writes
        new ones to them.
      has_traced_lengths: Whether one program serves all lengths that fit its capacity.
      vector_results: What values that its kernels read back from the vector unit are
        assumed to be, see ``tpu_timing.Machine``; None if they read none.
    """

    name: str
    kernel: str | None = None
    is_paged: bool = False
    has_traced_lengths: bool = False
    vector_results: int | None = None

    @property
    def script(self) -> Path:
        return SCRIPTS / f"compile_{self.kernel or self.name}.py"


PEERS = {
    peer.name: peer
    for peer in (
        Peer("rpa_v3", is_paged=True, has_traced_lengths=True),
        # It reads back whether the scores of a block exceed a bound, and computes the
        # block anew if so. 0 is the usual case, no excess.
        Peer("flywheel", vector_results=0),
        Peer("splash"),
        Peer("splash_0_0_5", kernel="splash"),
    )
}


@dataclasses.dataclass(frozen=True)
class Capacity:
    """The sizes of the arrays of a call.

    Attributes:
      tokens: New tokens of all sequences.
      sequences: How many.
      pages_per_sequence: Columns of the page table; 0 without pages.
    """

    tokens: int
    sequences: int
    pages_per_sequence: int


@dataclasses.dataclass(frozen=True)
class PeerCall:
    """One call of a peer.

    Attributes:
      peer: One of ``PEERS``.
      chip: One of ``chips.COMPILED``.
      num_q_heads: Hq.
      num_kv_heads: Hkv.
      head_dim: Of queries and keys.
      sequences: Those with one new token first.
      v_head_dim: Of values and output; ``head_dim`` if None.
      dtype: Of all arrays.
      causal: Whether queries see only keys up to their own position.
      window: Positions that a query sees, or None for all.
      page_size: Tokens of a page, if the peer has pages.
      blocks: Block sizes by the peer's names; its own choice if empty.
      libtpu: Release of the compiler; that of the peer's environment if None.
      capacity: Sizes of the arrays; what the sequences need if None.
    """

    peer: str
    chip: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    sequences: tuple[Sequence, ...]
    v_head_dim: int | None = None
    dtype: str = "bfloat16"
    causal: bool = True
    window: int | None = None
    page_size: int = DEFAULT_PAGE_SIZE
    blocks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    libtpu: str | None = None
    capacity: Capacity | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def needed_capacity(self) -> Capacity:
        """What the sequences fill."""
        longest = max(sequence.kv_len for sequence in self.sequences)
        return Capacity(
            tokens=sum(sequence.q_len for sequence in self.sequences),
            sequences=len(self.sequences),
            pages_per_sequence=-(-longest // self.page_size),
        )

    @property
    def ideal(self) -> workloads.Ideal:
        """Bytes and operations that the call needs."""
        item_bytes = ITEMSIZES[self.dtype]
        shape = workloads.RpaShape(
            max_seqs=len(self.sequences),
            pages_per_seq=0,
            num_pages=0,
            page_size=self.page_size,
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim,
            q_bytes=item_bytes,
            kv_bytes=item_bytes,
        )
        return workloads.ideal(
            shape,
            list(self.sequences),
            self.causal,
            self.window,
            # Cached tokens of a peer without pages are in pages as well.
            writes_cache=PEERS[self.peer].is_paged
            or any(s.q_len < s.kv_len for s in self.sequences),
        )

    def request(self) -> dict:
        """What the script reads: values that JSON has."""
        capacity = self.capacity or self.needed_capacity
        pages = capacity.sequences * capacity.pages_per_sequence
        return {
            "topology": chips.COMPILED[self.chip].topology,
            "num_q_heads": self.num_q_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "v_head_dim": self.v_head_dim or self.head_dim,
            "dtype": self.dtype,
            "causal": self.causal,
            "window": self.window,
            "sequences": [[s.q_len, s.kv_len] for s in self.sequences],
            "has_decodes": any(s.q_len == 1 for s in self.sequences),
            "has_others": any(s.q_len > 1 for s in self.sequences),
            "page_size": self.page_size,
            "max_tokens": capacity.tokens,
            "max_seqs": capacity.sequences,
            "pages_per_seq": capacity.pages_per_sequence,
            "num_pages": min(pages, compiler.MAX_PAGES),
            "blocks": dict(self.blocks),
        }


def sharing_programs(calls: Iterable[PeerCall]) -> list[PeerCall]:
    """The same calls, with one capacity for those that differ in lengths only.

    So each such group is compiled once, if the peer's program serves all lengths. A
    peer that chooses its own blocks may choose them by the capacity.
    """
    calls = list(calls)
    groups: dict[str, list[Capacity]] = {}
    for call in calls:
        groups.setdefault(_lengthless(call), []).append(
            call.capacity or call.needed_capacity
        )
    return [
        dataclasses.replace(call, capacity=_largest(groups[_lengthless(call)]))
        if PEERS[call.peer].has_traced_lengths
        else call
        for call in calls
    ]


def _lengthless(call: PeerCall) -> str:
    fields = dataclasses.asdict(
        dataclasses.replace(call, sequences=call.sequences[:1], capacity=None)
    )
    request = call.request()
    fields["sequences"] = [request["has_decodes"], request["has_others"]]
    return json.dumps(fields)


def _largest(capacities: Iterable[Capacity]) -> Capacity:
    rows = np.array([dataclasses.astuple(capacity) for capacity in capacities])
    return Capacity(*rows.max(axis=0).tolist())


def _check(call: PeerCall) -> None:
    """Raises ``ValueError`` for what no peer has."""
    for name, value, known in (
        ("peer", call.peer, PEERS),
        ("chip", call.chip, chips.COMPILED),
        ("dtype", call.dtype, ITEMSIZES),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected one of {sorted(known)}, got {value!r}")
    for name, size in (
        ("num_q_heads", call.num_q_heads),
        ("num_kv_heads", call.num_kv_heads),
        ("head_dim", call.head_dim),
        ("v_head_dim", call.v_head_dim),
        ("window", call.window),
        ("page_size", call.page_size),
    ):
        if size is not None and size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if not call.sequences:
        raise ValueError("sequences: expected one or more, got none")
    for sequence in call.sequences:
        if not 0 < sequence.q_len <= sequence.kv_len:
            raise ValueError(f"sequences: expected 0 < q_len <= kv_len, got {sequence}")
    is_decode = [s.q_len == 1 for s in call.sequences]
    if is_decode != sorted(is_decode, reverse=True):
        raise ValueError(
            "sequences: expected those with one new token first, got "
            f"{[s.q_len for s in call.sequences]} new tokens"
        )
    if call.num_q_heads % call.num_kv_heads:
        raise ValueError(
            f"num_q_heads: expected a multiple of num_kv_heads={call.num_kv_heads}, "
            f"got {call.num_q_heads}"
        )
    if call.capacity is None:
        return
    needed, given = call.needed_capacity, call.capacity
    if any(
        have < need
        for have, need in zip(
            dataclasses.astuple(given), dataclasses.astuple(needed), strict=True
        )
    ):
        raise ValueError(f"capacity: expected {needed} or more, got {given}")
    if not PEERS[call.peer].has_traced_lengths and given != needed:
        raise ValueError(
            f"capacity: expected {needed}, since each length is a program of "
            f"{call.peer}, got {given}"
        )

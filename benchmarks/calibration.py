"""From a published time to its prediction: calls of the kernel that was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks import published
from benchmarks.accuracy import Comparison
from benchmarks.peers.calls import DEFAULT_PAGE_SIZE, PeerCall, sharing_programs
from benchmarks.peers.prediction import predict_call
from benchmarks.published import Cell
from benchmarks.tpu_timing import DmaModel
from benchmarks.tpu_timing.workloads import Sequence
from jax_kernels import chips

# A published time of which nothing is said was taken as libtpu runs untold.
CLOCKS = {"locked": "highest", "default": "default", "not stated": "default"}


def peer_calls(
    cells: Iterable[Cell], releases: Mapping[str, str] | None = None
) -> dict[str, list[PeerCall]]:
    """By the name of a cell, the calls whose times it adds up.

    Calls that differ in lengths only share a program, where the peer's serves all
    lengths.

    Args:
      cells: Whose program is known.
      releases: Of the compiler, by the name of a cell; for others it is that of the
        measurement, as far as stated.
    """
    cells = list(cells)
    releases = releases or {}
    shared = iter(
        sharing_programs(
            _peer_call(cell, sequences, releases.get(cell.name))
            for cell in cells
            for sequences in cell.steps
        )
    )
    return {cell.name: [next(shared) for _ in cell.steps] for cell in cells}


def _peer_call(
    cell: Cell, sequences: tuple[Sequence, ...], libtpu: str | None
) -> PeerCall:
    return PeerCall(
        peer=cell.kernel,
        chip=cell.chip,
        num_q_heads=cell.num_q_heads,
        num_kv_heads=cell.num_kv_heads,
        head_dim=cell.head_dim,
        v_head_dim=cell.v_head_dim,
        dtype=cell.dtype,
        causal=cell.causal,
        window=cell.window,
        sequences=sequences,
        blocks=cell.blocks or {},
        libtpu=libtpu or cell.source.versions.get("libtpu"),
        page_size=cell.page_size or DEFAULT_PAGE_SIZE,
    )


def compare(
    cell: Cell,
    calls: list[PeerCall],
    directory: Path | None = None,
    python: str | None = None,
    *,
    clock: str | None = None,
) -> Comparison:
    """Predicts a cell; the operations around the kernel move bytes at full speed.

    Args:
      cell: One whose program is known.
      calls: Those of ``peer_calls``.
      directory: Where environments and dumps are, see ``predict_call``.
      python: The Python that makes environments.
      clock: One of ``chips.CLOCKS``; that of the measurement if None.

    Raises:
      RuntimeError, ValueError, SimulationError: As ``predict_call``.
    """
    clock = clock or CLOCKS[cell.source.clock]
    programs: dict = {}
    predictions = [
        predict_call(call, directory, python, programs=programs, clock=clock)
        for call in calls
    ]
    bandwidth = DmaModel().efficiency * chips.COMPILED[cell.chip].rates.hbm_bytes_per_s
    return Comparison(
        cell=cell.name,
        kernel=cell.kernel,
        chip=cell.chip,
        kind=cell.kind,
        held_back=cell.held_back,
        clock=clock,
        predicted_us=sum(p.microseconds for p in predictions)
        + 1e6 * cell.transposed_bytes / bandwidth,
        published_us=cell.microseconds,
        libtpu=predictions[0].versions["libtpu"],
        measured_with=cell.source.versions.get("libtpu"),
    )


def comparable_cells() -> list[Cell]:
    """The cells whose program can be compiled."""
    return [cell for cell in published.usable_cells() if cell.program_known]

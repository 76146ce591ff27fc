"""Results as text, JSON and Chrome-trace timelines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from benchmarks.tpu_timing.program import Program
from benchmarks.tpu_timing.result import Loop, Result
from jax_kernels.chips import Chip


def as_dict(result: Result) -> dict:
    """Everything but the timeline, ready for JSON."""
    skip = ("timeline", "transfers")
    names = [f.name for f in dataclasses.fields(result) if f.name not in skip]
    data = {name: getattr(result, name) for name in names}
    data["loops"] = [dataclasses.asdict(loop) for loop in result.loops]
    for name in ("microseconds", "code_bytes", "code_fetches"):
        data[name] = getattr(result, name)
    return data


def as_text(result: Result, loops: int = 6) -> str:
    """Where the cycles went: units, waits, and the most expensive loops."""

    def row(name: str, cycles: float, note: str = "") -> str:
        return f"  {name:<20}{cycles:>14.0f} {_share(cycles, result)}{note}"

    lines = [
        f"{result.kernel} on {result.chip}: {result.microseconds:.1f} us, "
        f"{result.cycles:.0f} cycles",
        row(
            "scheduled cycles",
            result.schedule_cycles,
            f"   ({result.executed_bundles} non-empty bundles)",
        ),
        row(
            "DMA wait cycles",
            result.dma_wait_cycles,
            f"   ({result.stalled_waits} of {result.waits} waits stalled)",
        ),
        row("MXU stall cycles", result.mxu_stall_cycles),
        row(
            "code wait cycles",
            result.code_wait_cycles,
            f"   ({result.code_fetches} overlays, {result.code_bytes} bytes; "
            f"{result.code_start_cycles:.0f} before the start)",
        ),
        row("HBM channel busy", result.hbm_busy_cycles),
    ]
    for direction, num_bytes in sorted(result.bytes_moved.items()):
        count = result.dma_count[direction]
        lines.append(f"  {direction:<20}{num_bytes:>14} bytes in {count} DMAs")
    for mxu, cycles in result.mxu_occupied_cycles.items():
        lines.append(row(f"MXU{mxu} multiplying", cycles))
    units = ", ".join(f"{name} {use:.1%}" for name, use in result.unit_share.items())
    lines.append(f"  unit use: {units}")
    lines += [_loop_line(loop, result) for loop in result.loops[:loops]]
    if result.nonzero_flags:
        lines.append(f"  WARNING sync flags left non-zero: {result.nonzero_flags}")
    lines += [f"  note: {warning}" for warning in result.warnings]
    return "\n".join(lines)


def _share(cycles: float, result: Result) -> str:
    return f"{cycles / result.cycles:6.1%}" if result.cycles else "   n/a"


def _loop_line(loop: Loop, result: Result) -> str:
    busiest = ", ".join(f"{n} {use:.0%}" for n, use in loop.busiest_units.items())
    code = ""
    if loop.code_wait_cycles:
        code = f", waits for code {_share(loop.code_wait_cycles, result).strip()}"
    return (
        f"  loop {loop.start:#x}-{loop.end:#x} depth {loop.depth}: "
        f"{loop.entries} entries, {loop.iterations} iterations, "
        f"{loop.cycles / max(loop.iterations, 1):.0f} cycles each, "
        f"{_share(loop.cycles, result).strip()} of time, "
        f"waits {_share(loop.dma_wait_cycles, result).strip()}{code}; {busiest}"
    )


def write_trace(path: str | Path, program: Program, chip: Chip, result: Result) -> None:
    """Writes a Chrome trace: one row for the core, one for each DMA direction.

    The run must have kept its timeline.
    """
    to_us = 1e6 / chip.rates.clock_hz
    events = [_row_name(1, f"{program.kernel} core (predicted)")]
    header_of = _innermost_headers(result)
    for block, begin, end, waited in result.timeline:
        label = f"block {block:#x}"
        if block in header_of:
            label += f" in loop {header_of[block][0]:#x}"
        arguments = {"dma_wait_us": waited * to_us}
        events.append(_span(1, label, begin * to_us, end * to_us, arguments))
    rows: dict[str, int] = {}
    for transfer in result.transfers:
        row = f"{transfer.source} to {transfer.target}"
        if row not in rows:
            rows[row] = len(rows) + 2
            events.append(_row_name(rows[row], row))
        begin, end = transfer.started * to_us, transfer.done * to_us
        arguments = {"issued_us": transfer.issued * to_us}
        events.append(_span(rows[row], f"{transfer.bytes} B", begin, end, arguments))
    with open(path, "w") as handle:
        json.dump({"traceEvents": events, "displayTimeUnit": "ns"}, handle)


def _innermost_headers(result: Result) -> dict[int, tuple[int, int]]:
    """For each bundle in a loop, the (start, end) of the shortest loop around it."""
    found: dict[int, tuple[int, int]] = {}
    for loop in sorted(result.loops, key=lambda loop: loop.start - loop.end):
        found.update(dict.fromkeys(range(loop.start, loop.end), (loop.start, loop.end)))
    return found


def _row_name(row: int, name: str) -> dict:
    arguments = {"name": name}
    return {"ph": "M", "pid": 1, "tid": row, "name": "thread_name", "args": arguments}


def _span(row: int, name: str, begin_us: float, end_us: float, arguments: dict) -> dict:
    return {
        "ph": "X",
        "pid": 1,
        "tid": row,
        "name": name,
        "ts": begin_us,
        "dur": end_us - begin_us,
        "args": arguments,
    }

"""Measures what a call of the torch operator costs on the host.

    python -m benchmarks.host
    python -m benchmarks.host --steps 2000 --layers 32 --json host.json

The XLA CPU device runs small steps with changing lengths, lazily and under
``torch.compile(backend="openxla")``. Tracing is the time until the call returns; the
step also holds what torch_xla does with the graph and, on this device, the computation
itself, so it is an upper bound. A step compiles once, whatever the lengths are.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Iterator

from benchmarks import environment, timing

MODES = ("lazy", "openxla")
MARK = "<!-- measured host -->"
TABLE_HEAD = (
    "| mode | call us, median (deciles) | step us, median (deciles) | compilations |",
    "|---|---|---|---|",
)
# Small, so that the host and not the computation is measured.
NUM_SEQUENCES, PAGES, PAGE_SIZE, MAX_TOKENS = 4, 4, 16, 16
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 128


def random_lengths(generator: random.Random) -> list[tuple[int, int]]:
    """(q_len, kv_len) of one step: some decodes, then perhaps a prefill."""
    longest = PAGES * PAGE_SIZE
    num_decodes = generator.randint(1, NUM_SEQUENCES - 1)
    lengths = [(1, generator.randint(1, longest)) for _ in range(num_decodes)]
    if generator.random() < 0.5:
        q_len = generator.randint(2, MAX_TOKENS - num_decodes)
        lengths.append((q_len, generator.randint(q_len, longest)))
    return lengths


def metadata_rows(lengths: list[tuple[int, int]]) -> tuple[list[int], ...]:
    """kv_lens [S], cu_q_lens [S + 1] and distribution [3] of one step."""
    padding = NUM_SEQUENCES - len(lengths)
    kv_lens = [kv_len for _, kv_len in lengths] + [0] * padding
    starts = [0]
    for q_len, _ in lengths:
        starts.append(starts[-1] + q_len)
    num_decodes = sum(q_len == 1 for q_len, _ in lengths)
    distribution = [num_decodes, num_decodes, len(lengths)]
    return kv_lens, starts + starts[-1:] * padding, distribution


def measure(mode: str, num_layers: int, steps: int) -> dict:
    """Runs one mode; returns costs in microseconds and the number of compilations."""
    import torch
    import torch_xla
    import torch_xla.debug.metrics as xla_metrics

    import torch_rpa

    device = torch_xla.device()
    q = torch.randn(MAX_TOKENS, HEADS, HEAD_DIM, dtype=torch.bfloat16).to(device)
    k, v = (
        torch.randn(MAX_TOKENS, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16).to(device)
        for _ in range(2)
    )
    num_pages = NUM_SEQUENCES * PAGES
    cache = (num_pages, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    caches = [
        torch_rpa.empty_kv_cache(*cache, dtype=torch.bfloat16).to(device)
        for _ in range(num_layers)
    ]
    table = torch.arange(num_pages, dtype=torch.int32).to(device)
    attend = torch.ops.rpa.ragged_paged_attention

    def layers(q, kv_lens, cu_q_lens, distribution):
        batch = kv_lens, table, cu_q_lens, distribution
        for kv_cache in caches:
            q = attend(q, k, v, kv_cache, *batch, sm_scale=HEAD_DIM**-0.5)
        return q

    step = layers
    if mode == "openxla":
        torch._dynamo.reset()
        step = torch.compile(layers, backend="openxla")
    batches = _batches(torch, device)
    torch_xla.sync(wait=True)
    xla_metrics.clear_all()

    calls, whole = [], []
    for index in range(steps + 2):
        batch = next(batches)
        torch_xla.sync(wait=True)
        called, done = _timed(lambda batch=batch: step(q, *batch), torch_xla)
        if index >= 2:  # the first compiles, the second fills torch_xla's own caches
            calls.append(called / num_layers)
            whole.append(done)
    compilations = xla_metrics.metric_data("CompileTime")
    return {
        "mode": mode,
        "layers": num_layers,
        "steps": steps,
        "call_per_layer": timing.summarize(calls).as_dict(),
        "whole_step": timing.summarize(whole).as_dict(),
        "compilations": compilations[0] if compilations else 0,
    }


def _batches(torch, device) -> Iterator[list]:
    """Metadata of steps whose lengths change each time, the same in every run."""
    generator = random.Random(0)
    while True:
        rows = metadata_rows(random_lengths(generator))
        yield [torch.tensor(row, dtype=torch.int32).to(device) for row in rows]


def _timed(call: Callable[[], object], torch_xla) -> tuple[float, float]:
    """Seconds until the call returns, and until all is computed."""
    start = time.perf_counter()
    result = call()
    called = time.perf_counter() - start
    torch_xla.sync(wait=True)
    del result
    return called, time.perf_counter() - start


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=8, help="calls in each step")
    parser.add_argument("--mode", choices=MODES, help="by default both")
    parser.add_argument("--json", metavar="FILE", help="write JSON; - prints it")
    parser.add_argument(
        "--update",
        metavar="FILE.md",
        help=f"replace the table between the file's two lines {MARK}",
    )
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.layers < 1:
        parser.error("--steps and --layers: expected at least 1")
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    described = environment.describe("host, XLA CPU device")
    quiet = options.json == "-"
    if not quiet:
        environment.print_header("cost of a call on the host, MEASURED", described)
        print("\n".join(TABLE_HEAD))
    rows = []
    for mode in [options.mode] if options.mode else MODES:
        row = measure(mode, options.layers, options.steps)
        rows.append(row)
        if not quiet:
            print(_line(row))
    if options.update:
        names = ("commit", "jax", "torch", "torch_xla")
        versions = ", ".join(f"{name} {described[name]}" for name in names)
        caption = (
            f"{versions}; {options.steps} steps of {options.layers} calls. MEASURED."
        )
        lines = [caption, "", *TABLE_HEAD, *map(_line, rows)]
        environment.update_markdown(options.update, MARK, lines)
    if options.json:
        content = {"kind": "measurement", "environment": described, "rows": rows}
        environment.write_json(options.json, content)
    return 0


def _line(row: dict) -> str:
    cells = [_cell(row[name]) for name in ("call_per_layer", "whole_step")]
    return f"| {row['mode']} | {cells[0]} | {cells[1]} | {row['compilations']} |"


def _cell(times: dict[str, float]) -> str:
    low, high = times["low_us"], times["high_us"]
    return f"{times['median_us']:.0f} ({low:.0f} to {high:.0f})"


if __name__ == "__main__":
    sys.exit(main())

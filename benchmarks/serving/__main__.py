"""Compares continuous batching with padded batches and with transformers' own.

    python -m benchmarks.serving
    python -m benchmarks.serving --scenario burst --device cpu --json serving.json

The same requests of the built-in model, greedily and in float32, go through

- ``engine``: ``torch_rpa.serving``;
- ``padded``: ``model.generate``, sixteen requests at a time in the order of arrival, to
  the longest of them, on the XLA device with a sync in each step;
- ``paged``: the same batches by ``custom_generate`` of this project;
- ``transformers``: continuous batching of transformers, which runs on plain CPU tensors
  only, so that it is compared there.

All must give the same tokens. Rounds alternate between the systems, after one that is
not timed; ratios are medians over rounds. Every figure is of a CPU: it says something
of scheduling, padding and compilations, and nothing of the kernel.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import sys
from typing import Any

from benchmarks import command_line, environment
from benchmarks.serving import comparison, jobs
from benchmarks.serving.jobs import LONGEST_TEXT, SCENARIOS, SHORTEST

DEVICES = ("cpu", "xla")
# Of the engine and of transformers' continuous batching; "padded" has the first alone.
MARK = "<!-- measured serving -->"
LABEL = "CPU scheduling figures, MEASURED; nothing of the kernel"


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, low, high in (
        ("requests", 1, math.inf),
        ("xla_requests", 1, math.inf),
        ("max_new_tokens", SHORTEST, LONGEST_TEXT),
        ("xla_max_new_tokens", SHORTEST, LONGEST_TEXT),
        ("rounds", 1, math.inf),
        ("threads", 1, math.inf),
    ):
        value = getattr(options, name)
        if not low <= value <= high:
            option = name.replace("_", "-")
            parser.error(f"--{option}: expected {low} to {high}, got {value}")
    command_line.check_update(parser, options.update, MARK)
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import torch

    torch.set_num_threads(options.threads)
    described = environment.describe("host CPU: plain tensors and XLA CPU device")
    described["transformers"] = importlib.metadata.version("transformers")
    quiet = options.json == "-"
    if not quiet:
        environment.print_header(f"continuous batching, {LABEL}", described)
        print("\n".join(_HEADER))
    text, rows, lines = jobs.prompt_text(), [], []
    for device in options.device or DEVICES:
        for scenario in options.scenario or SCENARIOS:
            count, longest = options.requests, options.max_new_tokens
            if device == "xla":
                count, longest = options.xla_requests, options.xla_max_new_tokens
            requests = jobs.make_jobs(scenario, count, text, longest_text=longest)
            rounds, threads = options.rounds, options.threads
            if device == "xla":
                results, reasons = comparison.run_scenario_in_process(
                    requests, device, rounds, threads
                )
            else:
                results, reasons = comparison.run_scenario(requests, device, rounds)
            for result in results:
                rows.append({"device": device, "scenario": scenario, **result})
                lines.append(_line(rows[-1]))
                if not quiet:
                    print(lines[-1], flush=True)
            for system, reason in reasons.items():
                row = {"device": device, "scenario": scenario, "system": system}
                rows.append({**row, "did_not_run": reason})
                lines.append(f"{system} did not run: {reason}")
                print(lines[-1], file=sys.stderr)
    if options.json:
        content = {"kind": LABEL, "environment": described, "rows": rows}
        environment.write_json(options.json, content)
    if options.update:
        names = ("commit", "torch", "torch_xla", "transformers")
        versions = ", ".join(f"{name} {described[name]}" for name in names)
        lines = [f"{versions}. {LABEL}.", "", *_HEADER, *lines]
        environment.update_markdown(options.update, MARK, lines)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=command_line.HelpFormatter,
    )
    described = "; ".join(f"{name}: {text}" for name, text in SCENARIOS.items())
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, help=described)
    parser.add_argument("--device", nargs="+", choices=DEVICES, help="by default both")
    parser.add_argument("--requests", type=int, default=32, help="on CPU tensors")
    parser.add_argument(
        "--max-new-tokens", type=int, default=LONGEST_TEXT, help="of a request there"
    )
    parser.add_argument(
        "--xla-requests",
        type=int,
        default=6,
        help="on the XLA device, where model.generate compiles every step",
    )
    parser.add_argument(
        "--xla-max-new-tokens", type=int, default=16, help="of a request there"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed, after one more")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--json", metavar="FILE", help="write JSON; - prints it")
    parser.add_argument(
        "--update", metavar="FILE", help=f"write the table between two lines {MARK}"
    )
    return parser


_HEADER = (
    "| device | scenario | system | tokens/s | engine / system (range) | "
    "system / padded (range) | median latency s | computed / needed | "
    "first round s | compilations, then |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def _line(row: dict[str, Any]) -> str:
    cells = (
        row["device"],
        row["scenario"],
        row["system"],
        f"{row['tokens_per_second']:.0f}",
        _ratio(row, "engine"),
        _ratio(row, "padded"),
        f"{row['median_latency_seconds']:.2f}",
        f"{row['computed_per_needed']:.2f}",
        f"{row['first_round_seconds']:.1f}",
        f"{row['first_round_compilations']}, {row['later_compilations']}",
    )
    return f"| {' | '.join(cells)} |"


def _ratio(row: dict[str, Any], other: str) -> str:
    low, high = row[f"{other}_ratio_range"]
    return f"{row[f'{other}_ratio']:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    sys.exit(main())

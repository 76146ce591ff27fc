"""Measures what a call of the torch operator costs on the host.

    python -m benchmarks.host
    python -m benchmarks.host --steps 2000 --layers 32 --json host.json
    python -m benchmarks.host --beside .venv-torchtpu/bin/python --compile-only v6e

It measures the framework of its environment: torch_xla on the XLA CPU device, or
TorchTPU. The two cannot be installed together. ``--beside`` names the Python of another
environment, which is measured in the same run: both take turns, so that the machine is
as busy for one as for the other. TorchTPU needs a TPU. ``--compile-only`` gives it that
of the tests in a checkout instead, which compiles for a chip and computes nothing.

A step is a model of attention only: small tensors, and other lengths in every step. A
call is the time until the function that runs a step returns, divided by the number of
calls in it. The step itself lasts until all is computed. On the XLA CPU device that is
real work, on a compile-only TPU it is none: there it says nothing of a TPU.

Ways of calling it:

    operator         torch.ops.rpa.ragged_paged_attention; torch_xla is lazy
    function         torch_rpa.ragged_paged_attention
    compiled         torch.compile of the whole step
    through jax_op   TorchTPU: the operator, with no other way than jax_op's own
    jax_op alone     TorchTPU: its operator of the JAX function, then Tensor.copy_
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from typing import Any, NamedTuple

from benchmarks import command_line, environment, timing
from benchmarks.host_worker import WAYS

MARK = "<!-- measured host -->"
TABLE_HEAD = (
    "| framework | way | call us, median (deciles) | least | step us, median (deciles) "
    "| compilations, then |",
    "|---|---|---|---|---|---|",
)
RATIO_HEAD = ("| ratio of calls | median (range) |", "|---|---|")


class Subject(NamedTuple):
    """A way of calling the operator in a framework."""

    framework: str
    way: str

    def __str__(self) -> str:
        return f"{self.framework} {self.way}"


# How many times the second costs the first does.
RATIOS = (
    (Subject("torch_tpu", "operator"), Subject("torch_xla", "operator")),
    (Subject("torch_tpu", "function"), Subject("torch_xla", "function")),
    (Subject("torch_tpu", "compiled"), Subject("torch_xla", "operator")),
    (Subject("torch_tpu", "compiled"), Subject("torch_xla", "compiled")),
    (Subject("torch_tpu", "through jax_op"), Subject("torch_tpu", "operator")),
    (Subject("torch_tpu", "jax_op alone"), Subject("torch_tpu", "operator")),
)


WORKER = "import sys; from benchmarks import host_worker; sys.exit(host_worker.main())"


class Failed(Exception):
    """A process that measures has ended; the reason is its own."""


class Worker:
    """A process of ``benchmarks.host_worker`` in one environment."""

    def __init__(self, python: str, num_layers: int, compile_only: str | None) -> None:
        command = [python, "-c", WORKER, "--layers", str(num_layers)]
        if compile_only is not None:
            command += ["--compile-only", compile_only]
        self._python = python
        try:
            self._process = subprocess.Popen(
                command,
                cwd=environment.ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:
            raise Failed(f"{python}: {error.strerror}") from error

    def answer(self) -> dict[str, Any]:
        """The next line that the process writes."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        content = json.loads(line) if line else {"error": "the process has failed"}
        if "error" in content:
            raise Failed(f"{self._python}: {content['error']}")
        return content

    def round(self, way: str, num_steps: int) -> dict[str, Any]:
        """Measures some steps."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"way": way, "steps": num_steps}) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        """Lets the process end, or ends it."""
        with self._process:  # closes both pipes, and waits
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()


def measure(
    workers: list[tuple[Worker, dict]], ways: list[str], rounds: int, num_steps: int
) -> dict[Subject, list[dict]]:
    """Runs all ways of all processes in turn, so many rounds; returns the answers."""
    measured: dict[Subject, list[dict]] = {}
    for _ in range(rounds):
        for way in ways:
            for worker, about in workers:
                if way in about["ways"]:
                    answers = measured.setdefault(Subject(about["framework"], way), [])
                    answers.append(worker.round(way, num_steps))
    return dict(sorted(measured.items()))


def row(subject: Subject, answers: list[dict]) -> dict[str, Any]:
    """What all rounds of a subject say."""
    calls = [seconds for answer in answers for seconds in answer["calls"]]
    whole = [seconds for answer in answers for seconds in answer["steps"]]
    first, *later = (answer["compilations"] for answer in answers)
    return {
        **subject._asdict(),
        "steps": len(calls),
        "call": timing.summarize(calls).as_dict() | {"least_us": 1e6 * min(calls)},
        "whole_step": timing.summarize(whole).as_dict(),
        "compilations": [first[0], first[1] + sum(map(sum, later))],
    }


def ratios(measured: dict[Subject, list[dict]]) -> list[dict[str, Any]]:
    """Those of ``RATIOS`` that were measured: of the medians of each round."""
    found = []
    for numerator, denominator in RATIOS:
        if numerator in measured and denominator in measured:
            medians = (
                [statistics.median(answer["calls"]) for answer in measured[subject]]
                for subject in (numerator, denominator)
            )
            of_rounds = [one / other for one, other in zip(*medians, strict=True)]
            found.append(
                {
                    "ratio": f"{numerator} / {denominator}",
                    "median": statistics.median(of_rounds),
                    "least": min(of_rounds),
                    "most": max(of_rounds),
                }
            )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host",
        description=__doc__,
        formatter_class=command_line.HelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=200, help="of each way")
    parser.add_argument("--rounds", type=int, default=10, help="that share the steps")
    parser.add_argument("--layers", type=int, default=8, help="calls in each step")
    parser.add_argument("--way", nargs="+", choices=WAYS, help="by default all")
    parser.add_argument(
        "--beside",
        metavar="PYTHON",
        help="the interpreter of another environment, to be measured in turn",
    )
    parser.add_argument(
        "--compile-only",
        metavar="CHIP",
        help="give TorchTPU the TPU of the tests, such as v6e, in a checkout",
    )
    parser.add_argument("--json", metavar="FILE", help="write JSON; - prints it")
    parser.add_argument(
        "--update",
        metavar="FILE.md",
        help=f"replace the tables between the file's two lines {MARK}",
    )
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.layers < 1 or options.rounds < 1:
        parser.error("--steps, --layers and --rounds: expected at least 1")
    command_line.check_update(parser, options.update, MARK)
    try:
        return _run(options)
    except Failed as failed:
        print(failed, file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    pythons = [sys.executable, *([options.beside] if options.beside else [])]
    ways = list(options.way or WAYS)
    rounds = min(options.rounds, options.steps)
    with contextlib.ExitStack() as stack:
        workers = []
        for python in pythons:
            worker = Worker(python, options.layers, options.compile_only)
            stack.callback(worker.end)
            workers.append((worker, worker.answer()))
        about = [about for _, about in workers]
        names = [one["framework"] for one in about]
        if len(set(names)) < len(names):
            raise Failed(f"expected environments of two frameworks, got {names[0]}")
        if options.json != "-":
            title = "cost of a call on the host, MEASURED"
            for one in about:
                environment.print_header(title, one["environment"])
        measured = measure(workers, ways, rounds, -(-options.steps // rounds))
    rows = [row(subject, answers) for subject, answers in measured.items()]
    found = ratios(measured)
    tables = [*TABLE_HEAD, *map(_line, rows)]
    if found:
        tables += ["", *RATIO_HEAD, *map(_ratio_line, found)]
    if options.json != "-":
        print("\n".join(tables))
    if options.update:
        caption = (
            f"{'; '.join(map(_versions, about))}; at least {options.steps} steps of "
            f"{options.layers} calls each, in {rounds} rounds. MEASURED."
        )
        environment.update_markdown(options.update, MARK, [caption, "", *tables])
    if options.json:
        content = {
            "kind": "measurement",
            "environments": [one["environment"] for one in about],
            "layers": options.layers,
            "rows": rows,
            "ratios": found,
        }
        environment.write_json(options.json, content)
    return 0


def _versions(about: dict[str, Any]) -> str:
    """What a table says of an environment."""
    described = about["environment"]
    names = ("chip", "commit", "jax", "torch", about["framework"])
    return ", ".join(f"{name} {described[name]}" for name in names)


def _line(row: dict[str, Any]) -> str:
    cells = (
        row["framework"],
        row["way"],
        _cell(row["call"]),
        f"{row['call']['least_us']:.0f}",
        _cell(row["whole_step"]),
        "{}, {}".format(*row["compilations"]),
    )
    return f"| {' | '.join(cells)} |"


def _cell(times: dict[str, float]) -> str:
    low, high = times["low_us"], times["high_us"]
    return f"{times['median_us']:.0f} ({low:.0f} to {high:.0f})"


def _ratio_line(ratio: dict[str, Any]) -> str:
    spread = f"{ratio['least']:.2f} to {ratio['most']:.2f}"
    return f"| {ratio['ratio']} | {ratio['median']:.2f} ({spread}) |"


if __name__ == "__main__":
    sys.exit(main())

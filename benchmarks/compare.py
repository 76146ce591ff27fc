"""Compares this kernel with those of others: same steps, same instrument, one run.

    python -m benchmarks.compare --peers rpa_v3 flywheel splash
    python -m benchmarks.compare --peers rpa_v3 --case llama-prefill-2k-at-8k
    python -m benchmarks.compare --update benchmarks/README.md --plot compared.png
    python -m benchmarks.compare --table deployments --update benchmarks/README.md

Every figure is a prediction, of this kernel and of theirs: libtpu compiles all of them,
one release for all, and one model of time executes them. Peers are compiled from their
published packages, for arrays as large as ours, with the blocks that they choose
themselves, with those that are published for the most similar step, and RPA v3 also
with smaller ones that suit many lengths; the fastest of them counts. Without --case,
--table and --seqs, the steps are those of the table `peers`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import (
    case_options,
    command_line,
    compiler,
    environment,
    plots,
    published,
)
from benchmarks.cases import Case
from benchmarks.peers.calls import PEERS, Capacity, PeerCall
from benchmarks.peers.prediction import PeerPrediction, predict_call
from benchmarks.prediction import Prediction, describe, predict
from benchmarks.progress import Progress
from benchmarks.tpu_timing.scalar_memory import SimulationError
from jax_kernels import chips
from jax_kernels.chips import Chip

# Peers as they are today: the others are older releases of the same kernels.
PRESENT = [name for name, peer in PEERS.items() if peer.kernel is None]
# Characters of a reason why there is no time; lengths may be many.
MOST_REASON = 160
MARK = "<!-- compared {table} {chip} -->"
# Blocks by peer that suit many lengths, for decode and for other steps. Those that RPA
# v3 chooses itself follow the longest context that its arrays could hold.
SENSIBLE_BLOCKS: dict[str, dict[str, dict[str, int]]] = {
    "rpa_v3": {
        "decode": {"bq_sz": 1, "bkv_sz": 4096, "bq_csz": 1, "bkv_csz": 2048},
        "other": {"bq_sz": 32, "bkv_sz": 2048, "bq_csz": 32, "bkv_csz": 512},
    }
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One step.

    Attributes:
      ours: Prediction of this kernel.
      peers: Of each peer its prediction, or why there is none.
    """

    ours: Prediction
    peers: dict[str, PeerPrediction | str]

    def ratio(self, peer: str) -> float | None:
        """Time of a peer by ours: above 1, ours is faster. None if it has no time."""
        theirs = self.peers[peer]
        if isinstance(theirs, str):
            return None
        return theirs.microseconds / self.ours.result.microseconds

    def as_dict(self) -> dict:
        """What JSON has of it."""
        theirs = {
            peer: found if isinstance(found, str) else found.as_dict()
            for peer, found in self.peers.items()
        }
        return {"ours": self.ours.as_dict(), **theirs}


def peer_call(peer: str, case: Case, chip: str, libtpu: str) -> PeerCall:
    """The call of a peer that computes what a case does, with blocks of its own.

    A peer may still refuse it when it is compiled.

    Raises:
      NotImplementedError: No call of a peer is made of such a case.
    """
    shape, model = case.shape, case.shape.model
    for name, value in (
        ("soft_cap", model.soft_cap),
        ("sinks", model.with_sinks or None),
        ("chunk_prefill_size", shape.chunk_prefill_size),
    ):
        if value is not None:
            raise NotImplementedError(f"{name} is not compared")
    if shape.cache_dtype != shape.q_dtype:
        raise NotImplementedError(f"a cache of {shape.cache_dtype} is not compared")
    return PeerCall(
        peer=peer,
        chip=chip,
        num_q_heads=model.num_q_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        sequences=tuple(case.sequences),
        dtype=shape.q_dtype,
        causal=shape.causal,
        window=model.sliding_window,
        page_size=shape.page_size,
        libtpu=libtpu,
        capacity=Capacity(
            shape.num_tokens, shape.num_sequences, shape.pages_per_sequence
        )
        if PEERS[peer].has_traced_lengths
        else None,
    )


def candidates(call: PeerCall) -> list[PeerCall]:
    """The call with the peer's own blocks, with published ones and with sensible ones.

    Published blocks are those of the nearest cell: one of the same chip and mask, if
    there is one, whose head dimension, key heads and context differ least, in this
    order.
    """
    longest = max(s.kv_len for s in call.sequences)
    is_decode = all(s.q_len == 1 for s in call.sequences)

    def distance(cell: published.Cell) -> tuple[float, ...]:
        context = max(s.kv_len for step in cell.steps for s in step)
        return (
            cell.chip != call.chip,
            cell.causal != call.causal,
            abs(cell.head_dim - call.head_dim),
            abs(cell.num_kv_heads - call.num_kv_heads),
            abs(math.log(context / longest)),
        )

    known = [
        cell
        for cell in published.usable_cells()
        if cell.kernel == call.peer
        and cell.blocks is not None
        and (cell.kind == "decode") == is_decode
    ]
    chosen: list[Mapping[str, Any]] = [call.blocks]
    if known:
        chosen.append(min(known, key=distance).blocks or {})
    if call.peer in SENSIBLE_BLOCKS:
        kind = "decode" if is_decode else "other"
        chosen.append(SENSIBLE_BLOCKS[call.peer][kind])
    return [dataclasses.replace(call, blocks=blocks) for blocks in chosen]


def compare(
    selected: Iterable[Case],
    peers: list[str],
    chip: Chip,
    libtpu: str,
    directory: Path | None = None,
    python: str | None = None,
) -> Iterator[Row]:
    """Predicts cases and peers, one case after the other.

    Args:
      selected: The steps.
      peers: Names of ``PEERS``.
      chip: At its highest clock.
      libtpu: Release that compiles the peers.
      directory: As in ``predict_call``.
      python: The Python that makes environments.
    """
    selected = list(selected)
    progress = Progress(len(selected) * (1 + len(peers)))
    for case in selected:
        with progress.compiling(case.name):
            program = compiler.compile_program(case.shape, chip.name)
            ours = predict(case, chip, program)
        theirs = {}
        for peer in peers:
            with progress.compiling(f"{peer} for {case.name}"):
                theirs[peer] = _fastest(
                    peer, case, chip.name, libtpu, directory, python
                )
        yield Row(ours, theirs)


def _fastest(
    peer: str,
    case: Case,
    chip: str,
    libtpu: str,
    directory: Path | None,
    python: str | None,
) -> PeerPrediction | str:
    """Of the candidates; or why there is none."""
    try:
        tried = candidates(peer_call(peer, case, chip, libtpu))
    except NotImplementedError as error:
        return str(error)
    found, errors = [], []
    for call in tried:
        try:
            found.append(predict_call(call, directory, python))
        except (RuntimeError, ValueError, OSError, SimulationError) as error:
            errors.append(str(error))
    if not found:
        reason = errors[0].splitlines()[-1].removeprefix("NotImplementedError: ")
        return textwrap.shorten(reason, MOST_REASON, placeholder=" ...")
    return min(found, key=lambda prediction: prediction.microseconds)


def table(rows: Iterable[Row], peers: list[str]) -> Iterator[str]:
    """Lines of a Markdown table as they are known; a dash is explained below it."""
    columns = ["step", "bound us", "ours us (bound / time)"]
    columns += [f"{peer} us (bound / time; times ours)" for peer in peers]
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    reasons: dict[str, None] = {}
    for row in rows:
        cells = [_cell(row, peer) for peer in peers]
        yield (
            f"| {row.ours.case.name} | {row.ours.bound_us:.1f} "
            f"| {_our_cell(row.ours)} | " + " | ".join(cells) + " |"
        )
        for peer, theirs in row.peers.items():
            if isinstance(theirs, str):
                reasons[f"{peer}, {row.ours.case.name}: {theirs}"] = None
    if reasons:
        yield ""
        yield from (f"- {reason}" for reason in reasons)


def _our_cell(ours: Prediction) -> str:
    """The kernel, what XLA puts around it, and the kernel's share of the bound."""
    around = f" + {ours.around_us:.1f}" if ours.around_us else ""
    time = ours.result.microseconds
    return f"{time:.1f}{around} ({ours.bound_us / time:.2f})"


def _cell(row: Row, peer: str) -> str:
    theirs, ratio = row.peers[peer], row.ratio(peer)
    if isinstance(theirs, str) or ratio is None:
        return "-"
    of_bound = row.ours.bound_us / theirs.microseconds
    return f"{theirs.microseconds:.1f} ({of_bound:.2f}; {ratio:.2f})"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=command_line.HelpFormatter,
    )
    case_options.add_case_arguments(parser)
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=sorted(PEERS),
        default=PRESENT,
        help=f"which kernels, by default {', '.join(PRESENT)}",
    )
    parser.add_argument(
        "--chip", choices=chips.COMPILED, default="tpu7x", help="where they would run"
    )
    command_line.add_peer_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write JSON; - prints it")
    parser.add_argument(
        "--update",
        metavar="FILE.md",
        help="replace the table between the file's two lines "
        + MARK.format(table="TABLE", chip="CHIP"),
    )
    parser.add_argument(
        "--plot", metavar="FILE.png", help="ratios as bars; needs matplotlib"
    )
    options = parser.parse_args(arguments)
    given = [bool(options.case), bool(options.table), bool(options.seqs)]
    if sum(given) > 1:
        parser.error("give at most one of --case, --table, --seqs")
    if sum(given) == 0:
        options.table = ["peers"]
    if options.update and not options.table:
        parser.error("--update: expected --table")
    if len(options.table or ()) > 1:
        parser.error(f"--table: expected one table, got {' '.join(options.table)}")
    command_line.check_update(parser, options.update, _mark(options))
    return options


def _mark(options: argparse.Namespace) -> str:
    return MARK.format(table=" ".join(options.table or ()), chip=options.chip)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.plot:
        plots.require_matplotlib()
    try:
        selected = case_options.selected_cases(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chip = chips.COMPILED[options.chip]
    described = describe(chip.name)
    quiet = options.json == "-"
    if not quiet:
        environment.print_header("kernels side by side on one TensorCore", described)
    rows: list[Row] = []

    def kept() -> Iterator[Row]:
        for row in compare(
            selected,
            options.peers,
            chip,
            described["libtpu"],
            options.directory,
            options.python,
        ):
            rows.append(row)
            yield row

    lines = []
    for line in table(kept(), options.peers):
        lines.append(line)
        if not quiet:
            print(line, flush=True)
    if options.update:
        lines = [environment.versions_line(described), "", *lines]
        environment.update_markdown(options.update, _mark(options), lines)
    if options.plot:
        plots.write_ratios(
            options.plot,
            [row.ours.case.name for row in rows],
            {peer: [row.ratio(peer) for row in rows] for peer in options.peers},
            f"Predicted time of other kernels by ours, {chip.name}",
        )
    if options.json:
        content = {
            "kind": "prediction",
            "environment": described,
            "rows": [row.as_dict() for row in rows],
        }
        environment.write_json(options.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())

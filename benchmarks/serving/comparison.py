"""Runs all systems in turn and compares what they made of the same jobs."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from benchmarks.serving import systems
from benchmarks.serving.jobs import Job, num_needed
from benchmarks.serving.systems import Outcome, UnavailableError


def compare(
    jobs: Sequence[Job],
    outcomes: dict[str, list[Outcome]],
) -> list[dict[str, Any]]:
    """Sums up the rounds of each system, of which the first is not timed.

    Raises:
        ValueError: Two systems, or two rounds, gave different tokens.
    """
    from torch_rpa.generate.check import first_difference

    expected = outcomes["padded"][0].tokens
    rows = []
    for name, rounds in outcomes.items():
        for outcome in rounds:
            difference = first_difference(outcome.tokens, expected)
            if difference is not None:
                raise ValueError(f"{name} differs from padded: {difference}")
        timed = rounds[1:]
        faster = _ratios(outcomes["engine"], rounds)
        than_padded = _ratios(rounds, outcomes["padded"])
        rows.append(
            {
                "system": name,
                "tokens_per_second": statistics.median(
                    outcome.tokens_per_second for outcome in timed
                ),
                "engine_ratio": statistics.median(faster),
                "engine_ratio_range": [min(faster), max(faster)],
                "padded_ratio": statistics.median(than_padded),
                "padded_ratio_range": [min(than_padded), max(than_padded)],
                "median_latency_seconds": statistics.median(
                    latency for outcome in timed for latency in outcome.latencies
                ),
                "computed_per_needed": statistics.median(
                    outcome.num_computed / num_needed(jobs) for outcome in timed
                ),
                "first_round_seconds": rounds[0].seconds,
                "first_round_compilations": rounds[0].num_compilations,
                "later_compilations": sum(o.num_compilations for o in timed),
            }
        )
    return rows


def _ratios(ours: list[Outcome], theirs: list[Outcome]) -> list[float]:
    """Returns how many times as fast ours were, round by round but the first."""
    return [
        one.tokens_per_second / other.tokens_per_second
        for one, other in zip(ours[1:], theirs[1:], strict=True)
    ]


def run_scenario(
    jobs: Sequence[Job], device: str, rounds: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Runs all systems of a device in turn, ``rounds`` times after a first one.

    Returns:
        A row for each system that ran, and the reason for each that could not.
    """
    import torch

    from torch_rpa.generate import models
    from torch_rpa.transformers import ATTENTION_NAME

    place: Any = device
    if device == "xla":
        import torch_xla

        place = torch_xla.device()
    loaded, outcomes, reasons = {}, {}, {}
    for name in systems.systems_for(device):
        attention = ATTENTION_NAME if name in systems.PAGED else "sdpa"
        model = models.load_model(None, attention, torch.float32).to(place)  # pyright: ignore[reportArgumentType]
        model.tie_weights()  # moving to an XLA device unties them
        loaded[name], outcomes[name] = model, []
    for _ in range(1 + rounds):
        for name, model in list(loaded.items()):
            try:
                outcomes[name].append(systems.SYSTEMS[name](model, jobs, device))
            except UnavailableError as error:
                reasons[name] = str(error)
                del loaded[name], outcomes[name]
    return compare(jobs, outcomes), reasons


def run_scenario_in_process(
    jobs: Sequence[Job], device: str, rounds: int, threads: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Does what :func:`run_scenario` does in a process of its own.

    Each program of XLA's CPU backend takes some hundred memory maps until its process
    ends. ``model.generate`` compiles hundreds of programs, and Linux lets a process
    have 65,530 maps unless told otherwise.

    Args:
        jobs: As for :func:`run_scenario`, like ``device`` and ``rounds``.
        device: Of the systems.
        rounds: Timed ones.
        threads: Of PyTorch.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, _use_threads, (threads,)) as process:
        return process.submit(run_scenario, jobs, device, rounds).result()


def _use_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)

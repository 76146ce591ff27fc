"""Compares continuous batching with padded batches and with transformers' own.

    python -m benchmarks.serving
    python -m benchmarks.serving --scenario burst --device cpu --json serving.json

The same requests of the built-in model, greedily and in float32, go through

- ``engine``: ``torch_rpa.serving``;
- ``padded``: ``model.generate``, sixteen requests at a time in the order of arrival, to
  the longest of them, on the XLA device with a sync in each step;
- ``transformers``: continuous batching of transformers, which runs on plain CPU tensors
  only, so that it is compared there.

All must give the same tokens. Rounds alternate between the systems, after one that is
not timed; ratios are medians over rounds. Every figure is of a CPU: it says something
of scheduling, padding and compilations, and nothing of the kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import logging
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import environment

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DEVICES = ("cpu", "xla")
# Of the engine and of transformers' continuous batching; "padded" has the first alone.
MAX_SEQUENCES, MAX_STEP_TOKENS, PAGE_SIZE = 16, 256, 16
SHORTEST, LONGEST_PROMPT, LONGEST_TEXT, SHARED_PREFIX = 8, 200, 96, 160
MEAN_INTERVAL = 0.1  # seconds between arrivals
PAD = 257
MARK = "<!-- measured serving -->"
LABEL = "CPU scheduling figures, MEASURED; nothing of the kernel"


@dataclasses.dataclass(frozen=True)
class Job:
    """A request: token ids, tokens to generate, and seconds after the start."""

    prompt_ids: list[int]
    max_new_tokens: int
    arrival: float = 0.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a system made of all jobs.

    Attributes:
        tokens: Generated token ids of each job.
        seconds: From the start until the last token.
        latencies: Seconds from the arrival of each job to its end.
        num_computed: Positions that went through the model, padding included.
        num_compilations: Programs that XLA compiled.
    """

    tokens: list[list[int]]
    seconds: float
    latencies: list[float]
    num_computed: int
    num_compilations: int

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


class UnavailableError(RuntimeError):
    """A system cannot run here; the message says why."""


def make_jobs(
    scenario: str,
    count: int,
    text: bytes,
    *,
    longest_text: int = LONGEST_TEXT,
    seed: int = 0,
) -> list[Job]:
    """Returns the requests of a scenario, in order of arrival.

    Lengths are spread evenly over their logarithms, so that most are short.

    Args:
        scenario: One of ``SCENARIOS``.
        count: How many.
        text: Prompts are pieces of it.
        longest_text: Most tokens to generate.
        seed: Of lengths, pieces and arrivals.
    """
    generator = random.Random(seed)

    def length(longest: int) -> int:
        low, high = math.log(SHORTEST), math.log(longest)
        return round(math.exp(generator.uniform(low, high)))

    def piece(num_bytes: int) -> list[int]:
        start = generator.randrange(len(text) - num_bytes)
        return list(text[start : start + num_bytes])

    is_shared = scenario == "shared-prefix"
    prefix = piece(SHARED_PREFIX) if is_shared else []
    longest = LONGEST_PROMPT - len(prefix)
    jobs, arrival = [], 0.0
    for _ in range(count):
        prompt = prefix + piece(length(longest))
        jobs.append(Job(prompt, length(longest_text), arrival))
        if scenario == "arrivals":
            arrival += generator.expovariate(1 / MEAN_INTERVAL)
    return jobs


SCENARIOS = {
    "burst": "requests of mixed lengths, all at the start",
    "arrivals": f"the same, {MEAN_INTERVAL} s apart on average",
    "shared-prefix": f"all at the start, the first {SHARED_PREFIX} tokens the same",
}


def num_needed(jobs: Sequence[Job]) -> int:
    """Positions that must be computed if nothing is shared: all but the last tokens."""
    return sum(len(job.prompt_ids) + job.max_new_tokens - 1 for job in jobs)


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[list, list]:
    """Returns token ids and mask, both [B, longest], with the padding on the left."""
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    ids = [[PAD] * n + [*prompt] for n, prompt in zip(pads, prompts, strict=True)]
    return ids, [[0] * n + [1] * (longest - n) for n in pads]


@contextlib.contextmanager
def counted_positions(model: PreTrainedModel) -> Iterator[Callable[[], int]]:
    """Counts what goes through a model, the same way for every system."""
    total = 0

    def count(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal total
        total += (args[0] if args else kwargs["input_ids"]).numel()

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield lambda: total
    finally:
        handle.remove()


def _measured(
    model: PreTrainedModel,
    jobs: Sequence[Job],
    run: Callable[[float, list[list[int]], list[float]], object],
) -> Outcome:
    """Times a run, which fills in the tokens of each job and when it ended."""
    from torch_rpa.transformers.model_runner import num_compilations

    tokens: list[list[int]] = [[] for _ in jobs]
    ends = [0.0] * len(jobs)
    compilations = num_compilations()
    with counted_positions(model) as positions:
        start = time.perf_counter()
        run(start, tokens, ends)
        seconds = time.perf_counter() - start
    latencies = [end - start - job.arrival for job, end in zip(jobs, ends, strict=True)]
    compiled = num_compilations() - compilations
    return Outcome(tokens, seconds, latencies, positions(), compiled)


def run_engine(model: PreTrainedModel, jobs: Sequence[Job], device: str) -> Outcome:
    """Runs the jobs through a new engine, whose prefix cache is empty."""
    from torch_rpa.generate.workload import TimedRequest, Workload, replay
    from torch_rpa.serving import Engine, EngineOptions, SamplingParams

    options = EngineOptions(
        max_num_sequences=MAX_SEQUENCES,
        max_tokens_per_step=MAX_STEP_TOKENS,
        max_sequence_length=LONGEST_PROMPT + LONGEST_TEXT,
        page_size=PAGE_SIZE,
        device=device,
    )
    requests = [
        TimedRequest(
            str(index),
            job.prompt_ids,
            SamplingParams(max_new_tokens=job.max_new_tokens),
            job.arrival,
        )
        for index, job in enumerate(jobs)
    ]

    def run(start: float, tokens: list[list[int]], ends: list[float]) -> None:
        index_of: dict[str, int] = {}
        engine = Engine(model, options)
        updates = replay(
            engine,
            Workload(requests),
            lambda name, request: index_of.update({name: int(request.name)}),
        )
        for update in updates:
            index = index_of[update.request_id]
            tokens[index] += update.new_tokens
            ends[index] = time.perf_counter()

    return _measured(model, jobs, run)


def _never_stop(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Ends no text, and makes each step a program: else all steps would be one."""
    import torch
    import torch_xla

    torch_xla.sync()
    return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def run_padded(model: PreTrainedModel, jobs: Sequence[Job], device: str) -> Outcome:
    """Runs batches of what has arrived, each padded and as long as its longest text."""
    import torch
    from transformers import GenerationConfig

    generate: Callable[..., torch.Tensor] = model.generate  # pyright: ignore

    def run(start: float, tokens: list[list[int]], ends: list[float]) -> None:
        first = 0
        while first < len(jobs):
            time.sleep(max(0.0, jobs[first].arrival - (time.perf_counter() - start)))
            now = time.perf_counter() - start
            batch = [j for j in jobs[first : first + MAX_SEQUENCES] if j.arrival <= now]
            ids, mask = left_padded([job.prompt_ids for job in batch])
            generated = generate(
                torch.tensor(ids).to(model.device),
                attention_mask=torch.tensor(mask).to(model.device),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max(job.max_new_tokens for job in batch),
                    pad_token_id=PAD,
                ),
                stopping_criteria=[_never_stop] if device == "xla" else None,
            )
            texts = generated[:, len(ids[0]) :].cpu().tolist()
            for index, (job, text) in enumerate(zip(batch, texts, strict=True), first):
                tokens[index] = text[: job.max_new_tokens]
                ends[index] = time.perf_counter()
            first += len(batch)

    return _measured(model, jobs, run)


def run_transformers(
    model: PreTrainedModel, jobs: Sequence[Job], device: str
) -> Outcome:
    """Runs the jobs through continuous batching of transformers.

    Raises:
        UnavailableError: This release of transformers cannot, or it stopped.
    """
    try:
        from transformers import ContinuousBatchingConfig, GenerationConfig
    except ImportError as error:
        version = importlib.metadata.version("transformers")
        raise UnavailableError(
            f"transformers {version} has no ContinuousBatchingConfig, and without it "
            "its continuous batching finds no memory on a CPU; newer ones have it"
        ) from error
    pages = -(-(LONGEST_PROMPT + LONGEST_TEXT) // PAGE_SIZE)
    options = ContinuousBatchingConfig(
        page_size=PAGE_SIZE,
        # Else it would measure memory, with a package that may be missing.
        num_blocks=MAX_SEQUENCES * pages,
        max_batch_tokens=MAX_STEP_TOKENS,
        max_requests_per_batch=MAX_SEQUENCES,
    )
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    serving: Callable[..., Any] = model.continuous_batching_context_manager  # pyright: ignore

    def run(start: float, tokens: list[list[int]], ends: list[float]) -> None:
        left, added = len(jobs), 0
        with serving(
            GenerationConfig(do_sample=False, pad_token_id=PAD),
            continuous_batching_config=options,
        ) as manager:
            while left:
                now = time.perf_counter() - start
                while added < len(jobs) and jobs[added].arrival <= now:
                    manager.add_request(
                        jobs[added].prompt_ids,
                        request_id=str(added),
                        max_new_tokens=jobs[added].max_new_tokens,
                    )
                    added += 1
                wait = jobs[added].arrival - now if added < len(jobs) else 1.0
                result = manager.get_result(timeout=max(wait, 1e-3))
                if result is None:
                    if not manager.is_running():
                        raise UnavailableError("its generation thread has stopped")
                elif result.error is not None:
                    raise UnavailableError(f"a request failed: {result.error}")
                elif result.is_finished():
                    index = int(result.request_id)
                    tokens[index] = list(result.generated_tokens)
                    ends[index] = time.perf_counter()
                    left -= 1

    return _measured(model, jobs, run)


SYSTEMS = {"engine": run_engine, "padded": run_padded, "transformers": run_transformers}


def systems_for(device: str) -> tuple[str, ...]:
    """Returns what runs on a device. The first is compared with all others."""
    return tuple(SYSTEMS) if device == "cpu" else ("engine", "padded")


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
        ratios = [
            ours.tokens_per_second / theirs.tokens_per_second
            for ours, theirs in zip(outcomes["engine"][1:], timed, strict=True)
        ]
        rows.append(
            {
                "system": name,
                "tokens_per_second": statistics.median(
                    outcome.tokens_per_second for outcome in timed
                ),
                "engine_ratio": statistics.median(ratios),
                "engine_ratio_range": [min(ratios), max(ratios)],
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
    for name in systems_for(device):
        attention = ATTENTION_NAME if name == "engine" else "sdpa"
        model = models.load_model(None, attention, torch.float32).to(place)  # pyright: ignore[reportArgumentType]
        model.tie_weights()  # moving to an XLA device unties them
        loaded[name], outcomes[name] = model, []
    for _ in range(1 + rounds):
        for name, model in list(loaded.items()):
            try:
                outcomes[name].append(SYSTEMS[name](model, jobs, device))
            except UnavailableError as error:
                reasons[name] = str(error)
                del loaded[name], outcomes[name]
    return compare(jobs, outcomes), reasons


def _prompt_text() -> bytes:
    """The text that prompts are taken from: what the built-in model knows."""
    from torch_rpa.generate.byte_llama import corpus

    return "\n".join(text for _, text in corpus.topics()).encode("ascii", "ignore")


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
    text, rows, lines = _prompt_text(), [], []
    for device in options.device or DEVICES:
        for scenario in options.scenario or SCENARIOS:
            count, longest = options.requests, options.max_new_tokens
            if device == "xla":
                count, longest = options.xla_requests, options.xla_max_new_tokens
            jobs = make_jobs(scenario, count, text, longest_text=longest)
            results, reasons = run_scenario(jobs, device, options.rounds)
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
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    described = "; ".join(f"{name}: {text}" for name, text in SCENARIOS.items())
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, help=described)
    parser.add_argument("--device", nargs="+", choices=DEVICES, help="default: both")
    parser.add_argument("--requests", type=int, default=32, help="on CPU tensors")
    parser.add_argument("--max-new-tokens", type=int, default=LONGEST_TEXT)
    parser.add_argument(
        "--xla-requests",
        type=int,
        default=6,
        help="on the XLA device, where model.generate compiles every step",
    )
    parser.add_argument("--xla-max-new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="timed, after one more")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--json", metavar="FILE", help="write JSON; - prints it")
    parser.add_argument(
        "--update", metavar="FILE", help=f"write the table between two lines {MARK}"
    )
    return parser


_HEADER = (
    "| device | scenario | system | tokens/s | engine / system (range) | "
    "median latency s | computed / needed | first round s | compilations, then |",
    "|---|---|---|---|---|---|---|---|---|",
)


def _line(row: dict[str, Any]) -> str:
    low, high = row["engine_ratio_range"]
    cells = (
        row["device"],
        row["scenario"],
        row["system"],
        f"{row['tokens_per_second']:.0f}",
        f"{row['engine_ratio']:.2f} ({low:.2f} to {high:.2f})",
        f"{row['median_latency_seconds']:.2f}",
        f"{row['computed_per_needed']:.2f}",
        f"{row['first_round_seconds']:.1f}",
        f"{row['first_round_compilations']}, {row['later_compilations']}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())

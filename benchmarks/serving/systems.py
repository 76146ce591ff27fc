"""The systems that are compared, each run over the same jobs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.serving.jobs import LONGEST_PROMPT, LONGEST_TEXT, Job

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Of the engine and of transformers' continuous batching; "padded" has the first alone.
MAX_SEQUENCES, MAX_STEP_TOKENS, PAGE_SIZE = 16, 256, 16
PAD = 257


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


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[list, list]:
    """Returns token ids and mask, both [B, longest], with the padding on the left."""
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    ids = [[PAD] * n + [*prompt] for n, prompt in zip(pads, prompts, strict=True)]
    return ids, [[0] * n + [1] * (longest - n) for n in pads]


@contextlib.contextmanager
def counted_positions(model: torch.nn.Module) -> Iterator[Callable[[], int]]:
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
    from torch_rpa import devices

    tokens: list[list[int]] = [[] for _ in jobs]
    ends = [0.0] * len(jobs)
    compilations = devices.num_compilations(model.device)
    with counted_positions(model) as positions:
        start = time.perf_counter()
        run(start, tokens, ends)
        seconds = time.perf_counter() - start
    latencies = [end - start - job.arrival for job, end in zip(jobs, ends, strict=True)]
    compiled = devices.num_compilations(model.device) - compilations
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
    stopping = {"stopping_criteria": [_never_stop]} if device == "xla" else {}
    return _run_batches(model, jobs, stopping)


def run_paged(model: PreTrainedModel, jobs: Sequence[Job], device: str) -> Outcome:
    """Runs the same batches by the custom generate of this project."""
    del device
    from torch_rpa.transformers import generate

    options = {"custom_generate": generate, "page_size": PAGE_SIZE}
    return _run_batches(model, jobs, options)


def _run_batches(
    model: PreTrainedModel, jobs: Sequence[Job], options: dict[str, Any]
) -> Outcome:
    """Runs batches of what has arrived, each as long as its longest text.

    Args:
        model: The model.
        jobs: In the order of their arrival.
        options: More arguments of ``model.generate``.
    """
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
                **options,
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


SYSTEMS = {
    "engine": run_engine,
    "padded": run_padded,
    "paged": run_paged,
    "transformers": run_transformers,
}
PAGED = ("engine", "paged")  # these take this project's attention


def systems_for(device: str) -> tuple[str, ...]:
    """Returns what runs on a device."""
    return tuple(SYSTEMS) if device == "cpu" else ("engine", "padded", "paged")

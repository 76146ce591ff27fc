"""The requests of each scenario."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

SHORTEST, LONGEST_PROMPT, LONGEST_TEXT, SHARED_PREFIX = 8, 200, 96, 160
MEAN_INTERVAL = 0.1  # seconds between arrivals


@dataclasses.dataclass(frozen=True)
class Job:
    """A request: token ids, tokens to generate, and seconds after the start."""

    prompt_ids: list[int]
    max_new_tokens: int
    arrival: float = 0.0


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


def prompt_text() -> bytes:
    """The text that prompts are taken from: what the built-in model knows."""
    from torch_rpa.generate.byte_llama import corpus

    return "\n".join(text for _, text in corpus.topics()).encode("ascii", "ignore")

"""Warm-up, median and spread of repeated runs."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one run.

    Attributes:
      median: Of all samples.
      low: First decile.
      high: Last decile.
      num_samples: Samples taken, after warm-up.
    """

    median: float
    low: float
    high: float
    num_samples: int

    def as_dict(self) -> dict[str, float]:
        return {
            "median_us": 1e6 * self.median,
            "low_us": 1e6 * self.low,
            "high_us": 1e6 * self.high,
            "num_samples": self.num_samples,
        }


def summarize(samples: list[float]) -> Timing:
    """Median and deciles; of one sample, the sample."""
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    median = statistics.median(samples)
    return Timing(median, deciles[0], deciles[-1], len(samples))


def time_runs(
    run: Callable[[int], None],
    finish: Callable[[], None],
    *,
    warm_up: int,
    repeats: int,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Times ``run`` and what it started.

    Args:
      run: Starts that many calls; they may go on when it returns.
      finish: Waits for all that was started.
      warm_up: Runs that are not counted, with compilation among them.
      repeats: Samples.
      calls: Calls in each sample, whose time is divided by it.
      clock: In seconds.
    """
    for _ in range(warm_up):
        run(calls)
    finish()
    samples = []
    for _ in range(repeats):
        start = clock()
        run(calls)
        finish()
        samples.append((clock() - start) / calls)
    return summarize(samples)

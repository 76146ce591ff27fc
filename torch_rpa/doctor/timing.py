"""The time of a step on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def median_seconds(
    run: Callable[[], None],
    finish: Callable[[], None],
    *,
    warm_up: int = 2,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Returns the median time of ``run`` and of what it started.

    Args:
        run: May return before what it started has ended.
        finish: Waits for all that was started.
        warm_up: Runs that are not counted, with compilation among them.
        repeats: Samples.
        clock: In seconds.
    """
    for _ in range(warm_up):
        run()
        finish()
    samples = []
    for _ in range(repeats):
        start = clock()
        run()
        finish()
        samples.append(clock() - start)
    return statistics.median(samples)

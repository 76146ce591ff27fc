"""Very many requests leave nothing behind."""

import gc
import itertools
import tracemalloc

import pytest
import torch

from tests.serving.traffic import random_traffic
from torch_rpa.serving import Engine, EngineOptions, RequestStatus
from torch_rpa.serving import engine as engine_module


@pytest.mark.extended
def test_memory_is_flat_over_twenty_thousand_requests(paged, monkeypatch):
    """The model is left out: a step gives each row a token of its own position."""
    options = EngineOptions(
        max_num_sequences=16,
        max_tokens_per_step=256,
        max_sequence_length=96,
        page_size=8,
        num_pages=120,
        device="cpu",
    )
    engine = Engine(paged, options)

    num_calls = itertools.count()

    def run(rows, size, is_greedy):
        if next(num_calls) % 500 == 499:
            raise RuntimeError("now and then")
        tokens = [(row.end * 7) % 256 for row in rows]
        return torch.tensor(tokens + [0] * (16 - len(rows)))

    monkeypatch.setattr(engine, "_run", run)
    monkeypatch.setattr(engine_module._logger, "disabled", True)
    sizes, num_failed = [], 0
    tracemalloc.start()
    for seed in range(20):
        for _, prompt, params in random_traffic(seed, 1000).requests:
            engine.add_request(prompt, params)
        for update in engine.stream():
            num_failed += update.output.status == RequestStatus.FAILED
        assert engine.scheduler.allocator.num_held == 0
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert engine.stats.num_failed_steps > 10 and num_failed <= 20
    # Cached prefixes fill the pool in the first rounds.
    assert max(sizes[5:]) < 1.1 * sizes[4], sizes
    print(engine.stats.num_steps, sizes)

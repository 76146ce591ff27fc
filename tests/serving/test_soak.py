"""Very many requests leave nothing behind."""

import gc
import itertools
import tracemalloc

import pytest
import torch

from tests.serving.traffic import random_traffic
from torch_rpa.generate.tokenizer import ByteTokenizer
from torch_rpa.serving import Engine, EngineOptions, RequestStatus
from torch_rpa.serving import engine as engine_module

ROUNDS, SETTLED = 20, 5
REQUESTS_OF_ROUND = 1000


@pytest.mark.extended
def test_memory_is_flat_over_twenty_thousand_requests(paged, monkeypatch):
    """Mostly without the model: a step gives each row a token of its own position.

    Steps of requests that change their logits or report log probabilities run it.
    """
    options = EngineOptions(
        max_num_sequences=16,
        max_tokens_per_step=256,
        max_sequence_length=96,
        page_size=8,
        num_pages=120,
        token_buckets=(16, 64, 256),  # shapes that were checked before are remembered
        device="cpu",
    )
    engine = Engine(paged, options, tokenizer=ByteTokenizer())
    num_calls = itertools.count()

    def run(rows, size, is_greedy):
        if next(num_calls) % 500 == 499:
            raise RuntimeError("now and then")
        tokens = [(row.end * 7) % 256 for row in rows]
        return torch.tensor(tokens + [0] * (16 - len(rows)))

    monkeypatch.setattr(engine._steps, "run", run)
    monkeypatch.setattr(engine_module._logger, "disabled", True)
    sizes, counts, num_failed = [], [], 0
    tracemalloc.start()
    for seed in range(ROUNDS):
        traffic = random_traffic(seed, REQUESTS_OF_ROUND, wish_share=0.005)
        for _, prompt, params in traffic.requests:
            engine.add_request(prompt, params)
        for update in engine.stream():
            num_failed += update.output.status == RequestStatus.FAILED
        assert engine.scheduler.allocator.num_held == 0
        del traffic, prompt, params, update
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])
        counts.append(len(gc.get_objects()))
    tracemalloc.stop()
    assert engine.stats.num_failed_steps > 10 and num_failed <= 20
    # Nothing is kept of any request: of one object for each, there would be thousands.
    assert max(counts[SETTLED:]) - counts[SETTLED - 1] < 100, counts
    # A number for each would be a pointer more, 8 bytes. Cached prefixes fill the pool
    # in the first rounds; after that, tables grow when there is more to do than before.
    num_after = (ROUNDS - SETTLED) * REQUESTS_OF_ROUND
    assert max(sizes[SETTLED:]) - sizes[SETTLED - 1] < 4 * num_after, sizes
    print(engine.stats.num_steps, sizes, counts)

"""Hundreds of random requests: tokens of one-by-one generation, and no page astray."""

import dataclasses
import random

import pytest

from tests.serving.oracle import expected_tokens
from tests.serving.page_audit import PageAudit
from tests.support.tiny_llama import VOCABULARY
from torch_rpa.serving import Engine, EngineOptions, RequestStatus, SamplingParams

EOS = 257


@dataclasses.dataclass
class Traffic:
    """Random requests, when they come and when they are cancelled.

    Attributes:
        requests: Step of arrival, prompt and parameters of each.
        cancelled: Index of a request to the number of steps after which it goes.
    """

    requests: list[tuple[int, list[int], SamplingParams]]
    cancelled: dict[int, int]


def random_traffic(seed, count, *, too_long=(), cancel_share=0.05):
    generator = random.Random(seed)

    def tokens(number):
        return [generator.randrange(VOCABULARY - 2) for _ in range(number)]

    prefixes = [tokens(length) for length in (16, 19, 33)]
    requests, cancelled, step = [], {}, 0
    for index in range(count):
        step += generator.choice((0, 0, 1, 2, 3))
        prompt = tokens(generator.choice((1, 2, 7, 8, 9, 15, 16, 17, 30)))
        if generator.random() < 0.5:
            prompt = generator.choice(prefixes) + prompt
        if generator.random() < 0.1 and requests:
            prompt = list(generator.choice(requests)[1])  # the same once more
        new_tokens = generator.randrange(1, 17)
        is_sampled = generator.random() < 0.3
        params = SamplingParams(
            max_new_tokens=200 if index in too_long else new_tokens,
            temperature=generator.choice((0.5, 1.5)) if is_sampled else 0.0,
            top_k=generator.choice((0, 5)),
            top_p=generator.choice((1.0, 0.8)),
            seed=generator.randrange(2**40),
            eos_token_ids=generator.choice(((), (EOS, generator.randrange(20)))),
        )
        requests.append((step, prompt, params))
        if generator.random() < cancel_share:
            cancelled[index] = step + generator.randrange(12)
    return Traffic(requests, cancelled)


def run(engine, traffic):
    """Lets the traffic happen; returns the outputs in order, checks every step."""
    audit = PageAudit(engine.scheduler)
    outputs, updates, step = {}, {}, 0
    names = [f"request {index}" for index in range(len(traffic.requests))]
    coming = list(zip(names, traffic.requests, strict=True))
    while coming or engine.has_unfinished:
        while coming and coming[0][1][0] <= step:
            name, (_, prompt, params) = coming.pop(0)
            engine.add_request(prompt, params, request_id=name)
            updates[name] = []
        for index, end in traffic.cancelled.items():
            if end == step:
                engine.cancel(names[index])
                audit.check_holders()
        for update in engine.step():
            outputs[update.request_id] = update.output
            updates[update.request_id] += update.new_tokens
            assert update.is_last == update.output.is_finished()
        step += 1
    audit.check_holders()
    assert engine.scheduler.allocator.num_held == 0
    assert not engine.scheduler.running and not engine.scheduler.waiting
    for name in names:
        assert updates[name] == outputs[name].generated_tokens
    return [outputs[name] for name in names], audit


def check(eager, traffic, outputs):
    for (_, prompt, params), output in zip(traffic.requests, outputs, strict=True):
        assert output.prompt_ids == prompt
        if output.status == RequestStatus.FAILED:
            continue
        assert output.generated_tokens == expected_tokens(eager, output, params)
        ends = [t for t in output.generated_tokens if t in params.eos_token_ids]
        assert ends in ([], output.generated_tokens[-1:])
        if output.status == RequestStatus.FINISHED:
            assert output.finish_reason == ("stop" if ends else "length")
            if not ends:
                assert len(output.generated_tokens) == params.max_new_tokens


@pytest.mark.parametrize(
    ("seed", "keywords"),
    [
        (0, {}),
        (1, {"num_pages": 14}),  # 7 for the longest: preemptions
        (2, {"num_pages": 14, "lookahead": False}),
        (3, {"prefix_caching": False, "max_tokens_per_step": 8}),
        (4, {"num_pages": 20, "max_tokens_per_step": 100, "page_size": 16}),
    ],
)
def test_tokens_equal_generation_one_by_one(eager, paged, seed, keywords):
    options = {
        "max_num_sequences": 6,
        "max_tokens_per_step": 24,
        "max_sequence_length": 96,
        "page_size": 8,
        "device": "cpu",
        **keywords,
    }
    engine = Engine(paged, EngineOptions(**options))
    traffic = random_traffic(seed, 100, too_long=(17, 50))
    outputs, audit = run(engine, traffic)
    check(eager, traffic, outputs)
    statuses = [output.status for output in outputs]
    failed = [i for i, s in enumerate(statuses) if s == RequestStatus.FAILED]
    assert failed == [17, 50]
    assert "must be at most 96 together" in outputs[17].error
    # Some were too late: the request had ended.
    cancelled = {i for i, s in enumerate(statuses) if s == RequestStatus.CANCELLED}
    assert cancelled and cancelled <= traffic.cancelled.keys()
    stats = engine.stats
    assert stats.num_generated == sum(len(o.generated_tokens) for o in outputs)
    assert (stats.num_preemptions > 0) == (options.get("num_pages") == 14)
    assert (audit.num_foreign_reads > 0) == options.get("prefix_caching", True)
    assert (stats.num_shared_tokens > 0) == options.get("prefix_caching", True)
    assert (stats.num_surplus > 0) == options.get("lookahead", True)
    assert stats.peak_pages_held <= engine.scheduler.allocator.num_pages


def test_the_same_on_the_xla_device_with_few_programs(eager, paged_on_xla):
    options = EngineOptions(
        max_num_sequences=5,
        max_tokens_per_step=24,
        max_sequence_length=96,
        page_size=8,
        num_pages=13,
    )
    engine = Engine(paged_on_xla, options)
    traffic = random_traffic(5, 40, too_long=(3,))
    outputs, audit = run(engine, traffic)
    check(eager, traffic, outputs)
    assert outputs[3].status == RequestStatus.FAILED
    assert engine.stats.num_preemptions > 0
    assert audit.num_foreign_reads > 0
    # Two buckets, 8 and 24, greedy and sampling, and the caches.
    assert engine.stats.max_compilations == 5
    assert engine.stats.num_compilations <= 5

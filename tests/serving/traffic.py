"""Random requests that come and go, and what must be true of every one of them."""

import dataclasses
import random

from tests.serving.oracle import expected_tokens
from tests.serving.page_audit import PageAudit
from tests.support.tiny_llama import VOCABULARY
from torch_rpa.serving import RequestStatus, SamplingParams


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

    # Two beginnings differ in their first page alone.
    second_page = tokens(8)
    prefixes = [tokens(8) + second_page, tokens(8) + second_page, tokens(33)]
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
            eos_token_ids=generator.choice(((), generator.sample(range(256), 20))),
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

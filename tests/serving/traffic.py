"""Random requests that come and go, and what must be true of every one of them."""

import dataclasses
import random

import torch

from tests.serving.oracle import expected_tokens, model_logits
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

    @property
    def texts(self):
        """Prompt, parameters and number of each text: some requests want several."""
        return [
            (prompt, params, index)
            for _, prompt, params in self.requests
            for index in range(params.n)
        ]


def random_traffic(seed, count, *, too_long=(), cancel_share=0.05, wish_share=0.0):
    """Makes requests at random.

    Args:
        seed: Of the random choices.
        count: Number of requests.
        too_long: Indices of requests that no engine can serve.
        cancel_share: Which part of them is cancelled, or would be if it lived so long.
        wish_share: Which part asks for more than plain tokens, as in ``_WISHES``. Those
            with structured outputs need an engine with a tokenizer of bytes.
    """
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
        if wish_share and generator.random() < wish_share:
            params = dataclasses.replace(params, **_wish(generator, params, prompt))
        requests.append((step, prompt, params))
        if generator.random() < cancel_share:
            cancelled[index] = step + generator.randrange(12)
    return Traffic(requests, cancelled)


_CHOICES = "yes", "no", "maybe", "never ever"
_WISHES = (
    *("n", "logprobs", "prompt_logprobs", "min_p", "penalties"),
    *("logit_bias", "bad_words_ids", "min_tokens", "structured_outputs"),
)


def _wish(generator, params, prompt):
    """Returns other values of some parameters."""
    wish = generator.choice(_WISHES)
    likely = [*prompt, *(generator.randrange(VOCABULARY) for _ in range(4))]
    values = {
        "n": {"n": 3, "temperature": 1.0},
        "logprobs": {"logprobs": generator.randrange(4)},
        "prompt_logprobs": {"prompt_logprobs": generator.randrange(4), "logprobs": 0},
        "min_p": {"min_p": 0.05, "temperature": 1.0},
        "penalties": {
            "repetition_penalty": generator.choice((1.0, 1.5)),
            "presence_penalty": generator.choice((0.5, -1.0)),
            "frequency_penalty": generator.choice((0.5, -1.0)),
        },
        "logit_bias": {
            "logit_bias": {t: generator.choice((-3.0, 3.0)) for t in likely}
        },
        "bad_words_ids": {
            "bad_words_ids": [[t] for t in likely[::2]] + [likely[-2:], likely[:2]]
        },
        "min_tokens": {"min_tokens": min(6, params.max_new_tokens)},
        "structured_outputs": {
            "structured_outputs": {"choice": _CHOICES},
            "eos_token_ids": (),
            "max_new_tokens": 12,  # enough for every choice
        },
    }
    return values[wish]


def run(engine, traffic):
    """Lets the traffic happen; returns the outputs in order, checks every step."""
    audit = PageAudit(engine.scheduler)
    outputs, updates, step = {}, {}, 0
    names = [f"request {index}" for index in range(len(traffic.requests))]
    coming = list(zip(names, traffic.requests, strict=True))
    while coming or engine.has_unfinished:
        while coming and coming[0][1][0] <= step:
            name, (_, prompt, params) = coming.pop(0)
            for text in engine.add_texts(prompt, params, request_id=name):
                updates[text] = []
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
    for name, tokens in updates.items():
        assert tokens == outputs[name].generated_tokens
    return [outputs[name] for name in updates], audit


def check(eager, traffic, outputs):
    """Checks tokens, log probabilities and ends of all texts that did not fail."""
    for (prompt, params, index), output in zip(traffic.texts, outputs, strict=True):
        assert output.prompt_ids == prompt and output.index == index
        if output.status == RequestStatus.FAILED:
            continue
        assert output.generated_tokens == expected_tokens(eager, output, params)
        check_logprobs(eager, params, output)
        ends = [t for t in output.generated_tokens if t in params.eos_token_ids]
        assert ends in ([], output.generated_tokens[-1:])
        if output.status != RequestStatus.FINISHED:
            continue
        if params.structured_outputs is not None:
            assert output.finish_reason == "stop"
            assert bytes(output.generated_tokens).decode() in _CHOICES
            continue
        assert output.finish_reason == ("stop" if ends else "length")
        if not ends:
            assert len(output.generated_tokens) == params.max_new_tokens
        assert len(output.generated_tokens) >= params.min_tokens


def check_logprobs(eager, params, output):
    """Checks log probabilities of the text and of what was computed of the prompt."""
    assert (output.logprobs is None) == (params.logprobs is None)
    assert (output.prompt_logprobs is None) == (params.prompt_logprobs is None)
    if params.logprobs is None and params.prompt_logprobs is None:
        return
    logprobs = model_logits(eager, output).log_softmax(dim=-1)
    num_prompt = len(output.prompt_ids)
    tokens = output.prompt_ids + output.generated_tokens
    found = [*(output.prompt_logprobs or [None] * num_prompt), *(output.logprobs or ())]
    if output.logprobs is not None:
        assert len(found) == len(tokens)
    if output.prompt_logprobs is not None:
        assert found[0] is None
        if output.status == RequestStatus.FINISHED:
            assert None not in found[1:num_prompt]
    for position, entries in enumerate(found):
        if entries is None:
            continue
        is_prompt = position < num_prompt
        count = params.prompt_logprobs if is_prompt else params.logprobs
        ids = [tokens[position], *(t for t in entries if t != tokens[position])]
        assert count is not None and count <= len(entries) <= count + 1
        values = torch.tensor([entries[token].logprob for token in ids])
        torch.testing.assert_close(
            values, logprobs[position - 1][ids], atol=1e-3, rtol=1e-3
        )

"""Logits are changed as the processors of transformers change them."""

import numpy as np
import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from torch_rpa.serving import SamplingParams
from torch_rpa.serving.logits_processing import (
    TokenRules,
    build_logits_inputs,
    num_special_tokens,
    process,
)
from torch_rpa.serving.logprobs import token_logprobs

VOCABULARY = 75  # not a whole number of words
PROMPT, TEXT = [3, 3, 70, 9], [5, 3, 5, 5, 74]
EOS = (2, 74)


def logits_of(num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, VOCABULARY, generator=generator) * 3


def rules_of(params, text=TEXT, grammar=None):
    rules = TokenRules(params, PROMPT, VOCABULARY, grammar)
    for token in text:
        rules.append(token)
    return rules


def inputs_of(rules, num_rows=None):
    return build_logits_inputs(
        rules,
        num_rows=num_rows or len(rules),
        num_special=num_special_tokens(VOCABULARY, 20),
        vocabulary=VOCABULARY,
    )


def processed(logits, params, text=TEXT):
    return process(logits, inputs_of([rules_of(params, text)] * len(logits)))


@pytest.mark.parametrize(
    ("params", "processor"),
    [
        (
            SamplingParams(repetition_penalty=1.3),
            RepetitionPenaltyLogitsProcessor(1.3),
        ),
        (
            SamplingParams(repetition_penalty=0.7),
            RepetitionPenaltyLogitsProcessor(0.7),
        ),
        (
            SamplingParams(logit_bias={5: 2.5, 6: -1.0, 0: 0.0}),
            SequenceBiasLogitsProcessor([[[5], 2.5], [[6], -1.0]]),
        ),
        (
            SamplingParams(
                bad_words_ids=[[7], [74, 8], [5, 74, 1], [5, 5, 6], [9, 5, 3]]
            ),
            NoBadWordsLogitsProcessor([[7], [74, 8], [5, 74, 1], [5, 5, 6], [9, 5, 3]]),
        ),
        (
            SamplingParams(bad_words_ids=[[0], [31], [32], [74]]),
            SuppressTokensLogitsProcessor([0, 31, 32, 74]),
        ),
        (
            SamplingParams(min_tokens=6, eos_token_ids=EOS),
            MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, torch.tensor(EOS)),
        ),
        (
            SamplingParams(min_tokens=5, eos_token_ids=EOS),
            MinNewTokensLengthLogitsProcessor(len(PROMPT), 5, torch.tensor(EOS)),
        ),
    ],
)
def test_each_change_equals_the_processor_of_transformers(params, processor):
    assert params.changes_logits
    logits = logits_of(4)
    tokens = torch.tensor([PROMPT + TEXT] * 4)
    assert torch.equal(processed(logits, params), processor(tokens, logits))


def test_presence_and_frequency_count_the_text_and_not_the_prompt():
    logits = logits_of(2)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=-0.25)
    expected = logits.clone()
    for token in set(TEXT):
        expected[:, token] -= 0.5 - 0.25 * TEXT.count(token)
    torch.testing.assert_close(processed(logits, params), expected)
    assert torch.equal(processed(logits, params, text=[]), logits)


def test_all_changes_together_come_in_the_order_of_transformers():
    logits = logits_of(3)
    tokens = torch.tensor([PROMPT + TEXT] * 3)
    params = SamplingParams(
        logit_bias={5: 2.5, 70: -4.0, 60: 1.0},
        repetition_penalty=1.5,
        bad_words_ids=[[74, 8]],
        min_tokens=9,
        eos_token_ids=EOS,
    )
    expected = logits
    for processor in (
        SequenceBiasLogitsProcessor([[[5], 2.5], [[70], -4.0], [[60], 1.0]]),
        RepetitionPenaltyLogitsProcessor(1.5),
        NoBadWordsLogitsProcessor([[74, 8]]),
        MinNewTokensLengthLogitsProcessor(len(PROMPT), 9, torch.tensor(EOS)),
    ):
        expected = processor(tokens, expected)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(processed(logits, params), expected)


class OddTokens:
    """A grammar of tokens that are odd, or even after an even one."""

    def __init__(self):
        self.parity = 1

    def accept(self, token):
        self.parity = token % 2

    def allowed_words(self):
        word = 0xAAAAAAAA if self.parity else 0x55555555
        return np.full(3, word, np.uint32)


def test_a_grammar_bans_what_cannot_follow():
    logits = logits_of(1)
    params = SamplingParams(bad_words_ids=[[9]])
    for text, first in (([], 1), ([4], 0)):
        rules = rules_of(params, text, OddTokens())
        expected = torch.full_like(logits, -torch.inf)
        expected[:, first::2] = logits[:, first::2]
        expected[:, 9] = -torch.inf
        assert torch.equal(process(logits, inputs_of([rules])), expected)


def test_rows_without_wishes_keep_their_logits():
    logits = logits_of(4)
    rules = [None, rules_of(SamplingParams(repetition_penalty=2.0))]
    changed = process(logits, inputs_of(rules, num_rows=4))
    assert torch.equal(changed[[0, 2, 3]], logits[[0, 2, 3]])
    assert not torch.equal(changed[1], logits[1])


@pytest.mark.torch_xla
def test_the_xla_device_changes_the_same_with_one_program():
    import torch_xla

    from torch_rpa import devices

    device, counts = torch_xla.device(), []
    for params in (
        SamplingParams(repetition_penalty=1.5, logit_bias={1: 3.0}),
        SamplingParams(bad_words_ids=[[31]], frequency_penalty=1.0),
    ):
        logits = logits_of(2)
        inputs = inputs_of([rules_of(params), None])
        on_xla = process(logits.to(device), inputs.to(device)).cpu()
        torch.testing.assert_close(on_xla, process(logits, inputs))
        counts.append(devices.num_compilations(device))
    assert counts[0] == counts[1]


def test_log_probabilities_are_those_of_the_softmax():
    logits = logits_of(5)
    tokens = torch.tensor([0, 5, 74, 3, 9])
    tokens[1] = logits[1].argmax()
    expected = logits.log_softmax(-1)
    found = token_logprobs(logits, tokens)
    for index, token in enumerate(tokens.tolist()):
        ordered = expected[index].argsort(descending=True).tolist()
        for count in (0, 1, 20):
            table = found.at(index, token, count)
            assert set(table) == {token, *ordered[:count]}
            for other, logprob in table.items():
                assert logprob.rank == ordered.index(other) + 1
                assert logprob.logprob == pytest.approx(
                    float(expected[index, other]), abs=1e-5
                )
    assert found.at(1, int(tokens[1]), 1, decode=str)[int(tokens[1])].rank == 1
    assert found.at(0, 0, 0, decode=str)[0].decoded_token == "0"

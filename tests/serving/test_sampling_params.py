"""Parameters are checked, and a generation config is taken over or refused."""

import pytest
from transformers import GenerationConfig

from torch_rpa.serving import SamplingParams


def converted(**fields):
    return SamplingParams.from_generation_config(GenerationConfig(**fields))


def test_an_empty_config_is_greedy():
    assert converted() == SamplingParams(max_new_tokens=20)


def test_sampling_means_what_it_means_to_generate():
    assert converted(do_sample=True) == SamplingParams(temperature=1.0, top_k=50)
    fields = {"temperature": 0.5, "top_k": 0, "top_p": 0.9, "max_new_tokens": 7}
    assert converted(do_sample=True, **fields) == SamplingParams(7, 0.5, 0, 0.9)


def test_stop_conditions_are_taken_over():
    params = converted(eos_token_id=[3, 4], stop_strings="end")
    assert params == SamplingParams(eos_token_ids=(3, 4), stop_strings=("end",))
    assert converted(eos_token_id=5).eos_token_ids == (5,)


def test_changes_win_over_the_config():
    config = GenerationConfig(max_new_tokens=5, eos_token_id=3)
    params = SamplingParams.from_generation_config(config, max_new_tokens=6, seed=1)
    assert params == SamplingParams(max_new_tokens=6, eos_token_ids=(3,), seed=1)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 2},
        {"repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"suppress_tokens": [1]},
        {"min_new_tokens": 2},
        {"max_length": 77},
    ],
)
def test_what_would_change_the_tokens_is_refused(fields):
    (name, *_) = fields
    with pytest.raises(NotImplementedError, match=name):
        converted(**fields)


def test_lists_are_taken_as_tuples():
    params = SamplingParams(eos_token_ids=[1], stop_sequences=[[1, 2]])
    assert params == SamplingParams(eos_token_ids=(1,), stop_sequences=((1, 2),))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, .*got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or at least 1e-05"),
        ({"temperature": float("inf")}, "and finite, got inf"),
        ({"temperature": float("nan")}, "and finite, got nan"),
        ({"top_k": -1}, r"top_k must be 0 \(all\) or more, .*got -1"),
        ({"top_p": 0.0}, "top_p must be more than 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "at most 1, got 1.1"),
        ({"top_k": 2**40}, r"top_k must be 0 .*, and below 2\*\*31"),
        ({"top_k": 1.5}, "top_k must be an int, got 1.5"),
        ({"top_p": "0.5"}, "top_p must be a number, got '0.5'"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"seed": "a"}, "seed must be an int or None, got 'a'"),
        ({"seed": 1.5}, "seed must be an int or None, got 1.5"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an int, got 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be an int, got True"),
        ({"eos_token_ids": "2"}, "eos_token_ids must be token ids, got '2'"),
        ({"eos_token_ids": [2.5]}, "eos_token_ids must be token ids, got"),
        ({"stop_sequences": 5}, "stop_sequences must be sequences of token ids, got 5"),
        ({"stop_sequences": ["ab"]}, "stop_sequences must be token ids, got 'ab'"),
        ({"stop_strings": [5]}, r"stop_strings must be texts, got \[5\]"),
        ({"stop_sequences": ((),)}, "one token or more each"),
        ({"stop_strings": ("a", "")}, "one character or more each"),
    ],
)
def test_impossible_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


def test_one_end_and_one_sequence_stand_for_a_list_of_them():
    params = SamplingParams(eos_token_ids=2, stop_sequences=[5, 6])
    assert (params.eos_token_ids, params.stop_sequences) == ((2,), ((5, 6),))
    assert SamplingParams().eos_token_ids is None

"""Parameters are checked, and a generation config is taken over or refused."""

import dataclasses

import pytest
from transformers import GenerationConfig

from torch_rpa.serving import SamplingParams, StructuredOutputsParams


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
    config = GenerationConfig(min_new_tokens=30, max_length=77, stop_strings=["a"])
    params = SamplingParams.from_generation_config(config, max_tokens=40, stop="b")
    assert params == SamplingParams(
        max_new_tokens=40, min_tokens=30, stop_strings=("b",)
    )


def test_a_largest_length_counts_the_prompt():
    config = GenerationConfig(max_length=77, min_new_tokens=30)
    for limits, expected in ({}, 64), ({"longest": 60}, 47), ({"longest": 90}, 64):
        params = SamplingParams.from_generation_config(config, num_prompt=13, **limits)
        assert params.max_new_tokens == expected
    with pytest.raises(ValueError, match="max_length must be more than the 77 tokens"):
        SamplingParams.from_generation_config(config, num_prompt=77)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 2},
        {"no_repeat_ngram_size": 3},
        {"max_length": 77},
    ],
)
def test_what_would_change_the_tokens_is_refused(fields):
    (name, *_) = fields
    with pytest.raises(NotImplementedError, match=name):
        converted(**fields)


def test_penalties_and_bans_are_taken_over():
    params = converted(
        repetition_penalty=1.2,
        min_new_tokens=2,
        bad_words_ids=[[1, 2], [9], [9, 3]],
        suppress_tokens=[4],
        eos_token_id=9,
    )
    # As in transformers, the end of the text is no bad word.
    assert params == SamplingParams(
        repetition_penalty=1.2,
        min_tokens=2,
        bad_words_ids=((1, 2), (9, 3), (4,)),
        eos_token_ids=(9,),
    )
    params = converted(do_sample=True, top_k=0, min_p=0.1, num_return_sequences=3)
    assert params == SamplingParams(temperature=1.0, min_p=0.1, n=3)


def test_names_that_other_engines_have_are_taken():
    params = SamplingParams(max_tokens=7, stop="end")
    assert params == SamplingParams(max_new_tokens=7, stop_strings=("end",))
    assert dataclasses.replace(params, max_new_tokens=8).max_new_tokens == 8
    assert params.changed(max_tokens=9, seed=1) == params.changed(
        max_new_tokens=9, seed=1
    )
    with pytest.raises(ValueError, match="max_tokens must be left out beside"):
        SamplingParams(max_new_tokens=7, max_tokens=8)
    with pytest.raises(ValueError, match="stop must be left out beside stop_strings"):
        SamplingParams(stop_strings="a", stop="b")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of json, regex and choice, got none"),
        ({"json": {}, "regex": "a"}, "got json and regex"),
        ({"json": 5}, "json must be a dict or JSON text, got 5"),
        ({"choice": []}, r"choice must be one str or more, got \[\]"),
        ({"choice": "ab"}, "choice must be a list of str, got 'ab'"),
    ],
)
def test_structured_outputs_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**fields)


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
        ({"min_p": 1.5}, "min_p must be at least 0 and at most 1, got 1.5"),
        ({"n": 0}, "n must be at least 1 and at most 16384, got 0"),
        ({"n": 10**9, "temperature": 1.0}, "at most 16384, got 1000000000"),
        (
            {"structured_outputs": {"grammar": "x"}},
            r"must have fields among \['json', .*\], got \['grammar'\]",
        ),
        ({"n": 2}, "n must be 1 at temperature 0, got 2"),
        ({"repetition_penalty": 0.0}, "more than 0 and finite, got 0.0"),
        ({"presence_penalty": 3.0}, "from -2 to 2, got 3.0"),
        ({"frequency_penalty": float("nan")}, "from -2 to 2, got nan"),
        ({"min_tokens": 21}, "at most max_new_tokens = 20, got 21"),
        ({"logit_bias": {1: float("inf")}}, "finite numbers for at most 300 tokens"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "at most 300 tokens"),
        ({"bad_words": [""]}, "bad_words must be one character or more each"),
        ({"bad_words_ids": [[]]}, "bad_words_ids must be one token or more each"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias must be token ids, got"),
        ({"logit_bias": [1]}, r"logit_bias must be token ids to numbers, got \[1\]"),
        ({"structured_outputs": 5}, "StructuredOutputsParams, a dict of its fields"),
        ({"logprobs": 21}, "logprobs must be None or 0 to 20, got 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be None or 0 to 20, got -1"),
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

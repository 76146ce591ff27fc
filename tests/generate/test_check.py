"""A comparison that finds the first difference, and a reference that is standard."""

import pytest

from torch_rpa.generate.check import first_difference, reference_generate


def test_equal_lists_have_no_difference():
    assert first_difference([[1, 2], []], [[1, 2], []]) is None


@pytest.mark.parametrize(
    ("got", "expected", "difference"),
    [
        ([[1], [2, 3]], [[1], [2, 4]], (1, 1, 3, 4)),
        ([[1, 2]], [[1]], (0, 1, 2, None)),
        ([[]], [[5]], (0, 0, None, 5)),
        ([[1, 9], [7]], [[1, 8], [6]], (0, 1, 9, 8)),
    ],
)
def test_the_first_difference_is_named(got, expected, difference):
    found = first_difference(got, expected)
    assert found == difference
    prompt, position = difference[:2]
    assert f"prompt {prompt}, generated token {position}" in str(found)


def test_the_reference_must_use_standard_attention(llama):
    with pytest.raises(ValueError, match="eager attention, got 'rpa'"):
        reference_generate(llama("rpa"), [1], max_new_tokens=1)


def test_the_reference_ignores_the_generation_config_of_the_model(llama):
    expected = reference_generate(llama("eager"), [1, 2], max_new_tokens=12)
    model = llama("eager")
    model.generation_config.repetition_penalty = 5.0
    assert reference_generate(model, [1, 2], max_new_tokens=12) == expected

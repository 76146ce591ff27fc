"""The parameter list: schema, dataclass and public function say the same."""

import dataclasses
import inspect

import pytest
import torch

import torch_rpa
from torch_rpa import ops
from torch_rpa.options import AttentionOptions
from torch_rpa.validation import Inputs

OPERATORS = (
    ops.ragged_paged_attention,
    ops.ragged_paged_attention_functional,
    ops.ragged_paged_attention_readonly,
)


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_schema_has_the_tensors_and_options_in_order(operator):
    arguments = [a for a in operator._schema.arguments if a.name != "donate_kv_cache"]
    fields = dataclasses.fields(AttentionOptions)
    assert [a.name for a in arguments if not a.kwarg_only] == list(Inputs._fields)
    options = [a for a in arguments if a.kwarg_only]
    assert [(a.name, a.default_value) for a in options] == [
        (field.name, field.default) for field in fields
    ]


def test_public_function_has_the_same_parameters_and_defaults():
    parameters = inspect.signature(torch_rpa.ragged_paged_attention).parameters
    keyword_only = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    expected = {f.name: f.default for f in dataclasses.fields(AttentionOptions)}
    assert keyword_only == expected | {"impl": None, "validate": None}
    assert [name for name in parameters if name not in keyword_only] == list(
        Inputs._fields
    )


def test_only_the_public_operator_mutates_and_only_the_cache():
    mutated = {
        operator.name(): [a.name for a in operator._schema.arguments if a.is_write]
        for operator in OPERATORS
    }
    assert list(mutated.values()) == [["kv_cache"], [], []]


@pytest.mark.parametrize(
    "options",
    [
        {"sm_scale": float("nan")},
        {"sliding_window": 0},
        {"chunk_prefill_size": -1},
        {"soft_cap": 0.0},
        {"k_scale": float("inf")},
        {"v_scale": -1.0},
        {"q_scale": 0.0},
        {"out_dtype": torch.float16},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_bad_option_is_named_in_the_error(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AttentionOptions(**options)

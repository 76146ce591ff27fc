"""One list of parameters: options, schemas and documented functions say the same."""

import dataclasses
import inspect

import pytest

import torch_rpa
from jax_kernels import ragged_paged_attention as rpa
from jax_kernels.contract import Arguments, AttentionOptions
from jax_kernels.contract.arguments import OPTIONS_AS_ARRAYS
from torch_rpa import ops

OPERATORS = [
    getattr(family, kind)
    for family in (ops.WITHOUT_LSE, ops.WITH_LSE)
    for kind in ("public", "functional", "readonly")
]
OPTIONS = [
    (field.name, field.default) for field in dataclasses.fields(AttentionOptions)
]
# What a function has besides the options: how it computes.
FUNCTIONS = {
    torch_rpa.ragged_paged_attention: {
        "block_sizes": None,
        "impl": None,
        "validate": None,
    },
    rpa.ragged_paged_attention: {
        "validate": False,
        "block_sizes": None,
        "vmem_limit_bytes": None,
        "chip": None,
        "interpret": False,
    },
    rpa.ragged_paged_attention_reference: {"validate": False},
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__module__)
def test_functions_have_the_arrays_then_the_options(function):
    parameters = inspect.signature(function).parameters.values()
    positional = [(p.name, p.default) for p in parameters if p.kind != p.KEYWORD_ONLY]
    no_default = inspect.Parameter.empty
    assert positional == [
        (name, Arguments._field_defaults.get(name, no_default))
        for name in Arguments._fields
        if name not in OPTIONS_AS_ARRAYS
    ]
    keywords = [(p.name, p.default) for p in parameters if p.kind == p.KEYWORD_ONLY]
    assert keywords == OPTIONS + list(FUNCTIONS[function].items())


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_schemas_have_the_arrays_then_the_options(operator):
    arguments = [a for a in operator._schema.arguments if a.name != "donate_kv_cache"]
    positional = [a.name for a in arguments if not a.kwarg_only]
    assert positional == list(Arguments._fields)
    keywords = [(a.name, a.default_value) for a in arguments if a.kwarg_only]
    # What an operator returns is a part of its name.
    options = [option for option in OPTIONS if option[0] != "return_lse"]
    assert keywords == [*options, ("block_sizes", None)]


def test_only_the_public_operator_mutates_and_only_the_cache():
    mutated = {
        operator.name(): [a.name for a in operator._schema.arguments if a.is_write]
        for operator in OPERATORS
    }
    assert list(mutated.values()) == 2 * [["kv_cache"], [], []]


def test_a_name_says_what_an_operator_returns():
    results = [[r.name for r in operator._schema.returns] for operator in OPERATORS]
    assert results == [
        [""],
        ["out", "new_cache"],
        [""],
        ["out", "lse"],
        ["out", "lse", "new_cache"],
        ["out", "lse"],
    ]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__module__)
def test_docstrings_describe_every_parameter(function):
    documented = inspect.getdoc(function) or ""
    for name in inspect.signature(function).parameters:
        assert f"\n    {name}: " in documented or f"\n  {name}: " in documented, name

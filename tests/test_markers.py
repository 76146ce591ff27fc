"""Which tests an expression of ``pytest -m`` leaves out."""

import types

import pytest

from tests.conftest import without_extended


def item(*markers):
    return types.SimpleNamespace(get_closest_marker=dict.fromkeys(markers, True).get)


@pytest.mark.parametrize("expression", ["", "not slow", "torch_tpu or not slow"])
def test_extended_tests_run_only_where_they_are_named(expression):
    usual, extended = item("slow"), item("extended")
    items = [extended, usual, extended]
    assert without_extended(items, expression) == ([usual], [extended, extended])


@pytest.mark.parametrize("expression", ["extended", "extended or not extended"])
def test_an_expression_that_names_them_decides_for_itself(expression):
    items = [item("extended"), item()]
    assert without_extended(items, expression) == (items, [])

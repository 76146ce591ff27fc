"""Scales of a whole model become numbers, and tensors of each layer."""

import math
from typing import Any

import pytest
import torch

from torch_rpa.layer_scales import scale_numbers, scale_tensors
from torch_rpa.scales import KVScales


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        (None, None),
        (2, 2.0),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([0.5, 2.0]), (0.5, 2.0)),
        ([1, torch.tensor(2.0)], (1.0, 2.0)),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), ((1.0, 2.0), (3.0, 4.0))),
        ([torch.tensor([1.0, 2.0]), (3,), 4.0], ((1.0, 2.0), (3.0,), 4.0)),
    ],
)
def test_scales_become_numbers_and_stay_them(given, numbers):
    assert scale_numbers("k_scale", given) == numbers
    assert scale_numbers("k_scale", numbers) == numbers


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("1", "k_scale must be a positive .* got '1'; with an entry for each layer"),
        (math.nan, "k_scale must be a positive Python number .* got nan"),
        (KVScales(1.0, 1.0), r"k_scale must be a positive .* got KVScales\(k_scale=1"),
        ([1.0, 0.0], "k_scale of layer 1 must be a positive .* got 0.0"),
        ([1.0, None], "k_scale of layer 1 must be a number .* got None"),
        ([[]], r"k_scale of layer 0 must be a number .* got \[\]"),
        ([[1.0, True]], "k_scale of layer 0 must be a positive .* got True"),
        (torch.ones(1, 1, 1), r"k_scale of layer 0 must .* got \[1.0\]"),
        (torch.tensor([1e39]), "k_scale of layer 0 must be a positive .* got inf"),
    ],
)
def test_what_are_no_scales_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        scale_numbers("k_scale", given)


def test_layers_get_one_for_each_head():
    found: Any = scale_tensors("k_scale", [0.5, [2.0, 4.0], [8.0]], [2, 2, 1], "cpu")
    assert [x.tolist() for x in found] == [[0.5, 0.5], [2.0, 4.0], [8.0]]
    assert {x.dtype for x in found} == {torch.float32}
    assert scale_tensors("k_scale", 0.5, [2], "cpu") == 0.5
    assert scale_tensors("k_scale", None, [2], "cpu") is None


def test_other_numbers_of_layers_and_heads_are_refused():
    with pytest.raises(ValueError, match=r"k_scale .* each of the 3 layers, got 2"):
        scale_tensors("k_scale", [1.0, 1.0], [2, 2, 2], "cpu")
    message = "v_scale .* each of the 2 key heads, in layer 1, got 3"
    with pytest.raises(ValueError, match=message):
        scale_tensors("v_scale", [[1.0, 1.0], [1.0] * 3], [2, 2], "cpu")

"""A changed weight and a switched adapter are seen, and nothing else."""

import pytest
import torch
from torch import nn

from torch_rpa.serving.model_version import ModelVersion


class Adapted(nn.Linear):
    """A layer that can be switched like a tuner layer of PEFT."""

    def __init__(self):
        super().__init__(2, 2)
        self.is_off, self.active_adapters = False, ["default"]
        self.merged_adapters, self.scaling = [], {"default": 1.0}

    @property
    def disable_adapters(self):
        return self.is_off


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(2, 2), Adapted(), nn.BatchNorm1d(2))


@torch.no_grad()
def add(model):
    model[0].weight.add_(1)


def optimise(model):
    model[0](torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def replace(model):
    model[0].weight = nn.Parameter(torch.ones(2, 2))


def replace_data(model):
    model[0].weight.data = torch.ones(2, 2)


def load(model):
    model.load_state_dict(model.state_dict())


def grow(model):
    model.append(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "change",
    [add, optimise, replace, replace_data, load, grow],
    ids=lambda f: f.__name__,
)
def test_changed_weights_are_another_model(model, change):
    version = ModelVersion(model)
    before = version.key()
    assert version.key() == before
    change(model)
    after = version.key()
    assert after != before and version.key() == after


def test_running_a_model_changes_nothing(model):
    version = ModelVersion(model)
    before = version.key()
    model(torch.ones(3, 2)).sum().backward()  # gradients, and buffers of statistics
    assert version.key() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_off", True),
        ("active_adapters", ["other"]),
        ("merged_adapters", ["default"]),
        ("scaling", {"default": 2.0}),
    ],
)
def test_a_state_of_adapters_comes_back(model, name, value):
    version = ModelVersion(model)
    before, former = version.key(), getattr(model[1], name)
    setattr(model[1], name, value)
    assert version.key() != before
    setattr(model[1], name, former)
    assert version.key() == before


def test_weights_without_versions_are_compared_by_identity(model):
    with torch.inference_mode():
        model[0].weight = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    version = ModelVersion(model)
    assert version.key() == version.key()

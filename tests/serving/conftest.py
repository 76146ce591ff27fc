"""Small models, built once."""

import pytest

from tests.support.tiny_llama import build_llama


@pytest.fixture(scope="package")
def eager():
    return build_llama("eager")


@pytest.fixture(scope="package")
def paged():
    return build_llama("rpa")


@pytest.fixture(scope="package")
def paged_on_xla():
    import torch_xla

    model = build_llama("rpa").to(torch_xla.device())
    model.tie_weights()
    torch_xla.sync()
    return model

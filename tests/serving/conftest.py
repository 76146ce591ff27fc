"""Small models, and one thread for their small operations."""

import pytest
import torch

from tests.support.tiny_llama import build_llama


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Threads of torch wait for each other far longer than these models compute."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


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

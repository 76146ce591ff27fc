"""A small model for the tests of the command line."""

import pytest

from tests.support.tiny_llama import build_llama


@pytest.fixture
def llama():
    """Builds a tiny Llama: ``llama("rpa")``, ``llama("eager", head_dim=128)``."""
    return build_llama

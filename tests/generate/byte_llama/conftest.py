"""The corpus of the running Python, read once."""

import pytest

from torch_rpa.generate.byte_llama import corpus


@pytest.fixture(scope="session")
def split() -> corpus.Split:
    return corpus.load_split()

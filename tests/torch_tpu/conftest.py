"""Marks all tests of this folder, so that none is left out of the run for TorchTPU."""

import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
    # The hook of any conftest.py is given the tests of all folders.
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.torch_tpu)

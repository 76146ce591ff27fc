"""Strict dtype promotion: a silent widening in a kernel is an error here."""

import jax
import pytest

from tests.support import interpret


@pytest.fixture(autouse=True)
def strict_dtype_promotion():
    """Two strong dtypes never mix without a cast."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True)
def bounded_number_of_programs():
    """Tests run one after the other in one process, each with programs of its own."""
    yield
    interpret.forget_old_programs()

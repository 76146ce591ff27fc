"""Strict dtype promotion: a silent widening in a kernel is an error here."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_dtype_promotion():
    """Two strong dtypes never mix without a cast."""
    with jax.numpy_dtype_promotion("strict"):
        yield

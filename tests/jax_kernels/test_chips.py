"""Chips are values that are looked up by name, and never an error."""

import dataclasses

import pytest

from jax_kernels.ragged_paged_attention import chips


@pytest.mark.parametrize(
    "name, chip",
    [
        ("v5e", chips.V5E),
        ("TPU v5 lite", chips.V5E),
        ("v6e", chips.V6E),
        ("TPU v6 lite", chips.V6E),
        ("tpu7x", chips.TPU7X),
        ("TPU7x", chips.TPU7X),
    ],
)
def test_a_chip_has_a_short_name_and_a_device_kind(name, chip):
    assert chips.find_chip(name) is chip


@pytest.mark.parametrize("name", [None, "", "TPU v99", "NVIDIA H100", "cpu"])
def test_an_unknown_chip_gets_limits_that_every_chip_meets(name):
    """Rule 12: a safe choice, not an exception."""
    unknown = chips.find_chip(name)
    for chip in (chips.V5E, chips.V6E, chips.TPU7X):
        assert unknown.vmem_bytes <= chip.vmem_bytes
        assert unknown.smem_bytes <= chip.smem_bytes


def test_a_chip_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        chips.V6E.vmem_bytes = 1  # type: ignore[misc]

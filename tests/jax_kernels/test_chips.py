"""Chips are values that are looked up by name, and never an error."""

import dataclasses
import subprocess
import sys

import pytest

from jax_kernels import chips

KNOWN = [*chips.CHIPS.values()]
DESCRIBED = [*chips.COMPILED.values()]


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("v4", chips.V4),
        ("TPU v4", chips.V4),
        ("TPU v5", chips.V5P),
        ("v5p-8", chips.V5P),
        ("v5e", chips.V5E),
        ("TPU v5 lite", chips.V5E),
        ("v5litepod-4", chips.V5E),
        ("v6e", chips.V6E),
        ("TPU v6 lite", chips.V6E),
        ("v6e-8", chips.V6E),
        ("tpu7x", chips.TPU7X),
        ("TPU7x", chips.TPU7X),
        ("tpu7x-8", chips.TPU7X),
        ("TPU v7", chips.TPU7X),
    ],
)
def test_a_chip_has_a_short_name_a_device_kind_and_an_accelerator_type(name, chip):
    assert chips.find_chip(name) is chip
    assert chips.short_name(name) == chip.name


@pytest.mark.parametrize("name", [None, "", "TPU v99", "v9-8", "NVIDIA H100", "cpu"])
def test_an_unknown_chip_gets_limits_that_every_chip_meets(name):
    """Rule 12: a safe choice, not an exception."""
    assert chips.short_name(name) is None
    unknown = chips.find_chip(name)
    for chip in KNOWN:
        assert unknown.vmem_bytes <= chip.vmem_bytes
        assert unknown.smem_bytes <= chip.smem_bytes


def test_no_name_means_two_chips_and_all_are_in_lower_case():
    names = [name for chip in KNOWN for name in (chip.name, *chip.other_names)]
    assert len(names) == len(set(names))
    assert names == [name.lower() for name in names]


def test_a_chip_that_is_compiled_for_has_rates_and_the_others_say_which_have():
    for chip in DESCRIBED:
        assert chip.topology.startswith(f"{chip.name}:")
        assert chip.rates.seconds(chip.rates.clock_hz) == 1.0
    for chip in (chips.V4, chips.V5P, chips.UNKNOWN):
        refused = pytest.raises(NotImplementedError, match=rf"tpu7x.*, got {chip.name}")
        with refused:
            _ = chip.rates
        with refused:
            _ = chip.topology


@pytest.mark.parametrize(
    ("chip", "teraflops"), [(chips.V5E, 197), (chips.V6E, 918), (chips.TPU7X, 1153)]
)
def test_peaks_are_those_of_the_data_sheets(chip, teraflops):
    """In bfloat16, of one TensorCore: a TPU7x chip has two, of 2307 in all."""
    assert chip.rates.bf16_flops_per_s / 1e12 == pytest.approx(teraflops, rel=0.01)


def test_a_chip_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        chips.V6E.vmem_bytes = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_chips_need_neither_jax_nor_torch():
    code = "import sys, jax_kernels.chips; print({'jax', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_the_default_clock_is_slower_and_leaves_memory_alone():
    chip = chips.TPU7X.at_clock("default")
    assert chip.rates.clock_hz == chips.TPU7X.rates.default_clock_hz
    assert chip.rates.hbm_bytes_per_s == chips.TPU7X.rates.hbm_bytes_per_s
    assert chip.rates.seconds(1e9) > chips.TPU7X.rates.seconds(1e9)
    assert chip.at_clock("default") == chip
    assert chips.TPU7X.at_clock("highest") is chips.TPU7X


def test_a_chip_with_one_clock_has_it_by_default():
    assert chips.V6E.at_clock("default") is chips.V6E
    with pytest.raises(ValueError, match="clock: expected one of"):
        chips.V6E.at_clock("lowest")

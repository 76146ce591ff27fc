"""Chooses the device before JAX or torch_xla is imported; skips hardware tests."""

import os
import pathlib

import hypothesis
import pytest

from jax_kernels import chips

# Property tests share two cores with compilations: time says nothing about them.
hypothesis.settings.register_profile(
    "untimed",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("untimed")


def _has_tpu() -> bool:
    if "RPA_TEST_TPU" in os.environ:
        return os.environ["RPA_TEST_TPU"] == "1"
    # /dev/vfio/vfio is only the driver; a numbered group is a device.
    return pathlib.Path("/dev/accel0").exists() or any(
        path.name.isdigit() for path in pathlib.Path("/dev").glob("vfio/*")
    )


HAS_TPU = _has_tpu()

if not HAS_TPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    for _name, _value in chips.COMPILE_ONLY_ENVIRONMENT.items():
        os.environ.setdefault(_name, _value)


def pytest_collection_modifyitems(items):
    """Skips tests marked ``tpu``, visibly, where there is no TPU."""
    if HAS_TPU:
        return
    skip = pytest.mark.skip(reason="needs a TPU; RPA_TEST_TPU=1 insists there is one")
    for item in items:
        if item.get_closest_marker("tpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def has_tpu() -> bool:
    """Whether the tests run on a TPU."""
    return HAS_TPU

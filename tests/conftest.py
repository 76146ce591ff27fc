"""Chooses the device before a framework is imported; skips what cannot run here."""

import importlib.util
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
    # Otherwise importing torch opens torch_tpu, which would look for a TPU.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    for _name, _value in chips.COMPILE_ONLY_ENVIRONMENT.items():
        os.environ.setdefault(_name, _value)


# The markers of pyproject.toml for tests of one framework.
FRAMEWORKS = ("torch_xla", "torch_tpu")


def pytest_collection_modifyitems(items):
    """Skips visibly what needs a TPU, or a framework, where there is none."""
    reasons = {
        name: f"needs {name}, which is not installed"
        for name in FRAMEWORKS
        if importlib.util.find_spec(name) is None
    }
    if not HAS_TPU:
        reasons["tpu"] = "needs a TPU; RPA_TEST_TPU=1 insists there is one"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def has_tpu() -> bool:
    """Whether the tests run on a TPU."""
    return HAS_TPU

"""Chooses the device before a framework is imported; skips what cannot run here."""

import importlib.util
import os

import hypothesis
import pytest

from jax_kernels import chips, machine

# Property tests share two cores with compilations: time says nothing about them.
hypothesis.settings.register_profile(
    "untimed",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("untimed")


# What children get that shall see the TPU.
GIVEN_ENVIRONMENT = dict(os.environ)

# Whether JAX computes on the TPU in this process, which then belongs to it alone. By
# default a TPU is left to the children of tests marked `tpu`.
HAS_TPU = os.environ.get("RPA_TEST_TPU") == "1"

# PyTorch stays off the TPU here in either case: two libraries cannot share one.
os.environ["PJRT_DEVICE"] = "CPU"
# Threads of torch wait for each other far longer than small models compute, most of all
# where several processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Otherwise importing torch opens torch_tpu, which would look for a TPU.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
if not HAS_TPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
    for _name, _value in chips.COMPILE_ONLY_ENVIRONMENT.items():
        os.environ.setdefault(_name, _value)


# The markers of pyproject.toml for tests of one framework.
FRAMEWORKS = ("torch_xla", "torch_tpu")
# Those for tests inside of engines of others, and what is imported there.
ENGINES = {"vllm": "vllm", "tpu_inference": "tpu_inference"}


def reason_without_tpu(
    variable: str | None, *, is_worker: bool, has_device: bool
) -> str | None:
    """Why tests marked ``tpu`` do not run, or None if they do.

    Args:
        variable: The value of RPA_TEST_TPU.
        is_worker: Whether this is one of several processes of pytest-xdist.
        has_device: Whether the machine has a TPU.
    """
    if variable == "0":
        return "RPA_TEST_TPU=0 leaves the TPU alone"
    if variable == "1":
        return "JAX holds the TPU in this process, for RPA_TEST_TPU=1"
    if not has_device:
        return "needs a TPU"
    if is_worker:
        return "one process at a time can hold the TPU: run pytest without -n"
    return None


def pytest_configure(config):
    """Refuses several processes that would each open the TPU."""
    if HAS_TPU and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError(
            "RPA_TEST_TPU=1 needs one process, since a TPU belongs to one: run pytest "
            "without -n"
        )


def without_extended(items, expression: str):
    """Splits tests into those that run and the extended ones, which do not.

    Those marked ``extended`` run only where the expression of ``-m`` names them: it
    takes the place of one in ``addopts``, so that ``-m "not slow"`` would run them.
    """
    parts: tuple[list, list] = [], []
    for item in items:
        is_left_out = item.get_closest_marker("extended") is not None
        parts[is_left_out and "extended" not in expression].append(item)
    return parts


def pytest_collection_modifyitems(config, items):
    """Skips visibly what needs a TPU, or a framework, where there is none."""
    items[:], extended = without_extended(items, config.option.markexpr)
    config.hook.pytest_deselected(items=extended)
    reasons = {
        name: f"needs {name}, which is not installed"
        for name in FRAMEWORKS
        if importlib.util.find_spec(name) is None
    }
    for marker, module in ENGINES.items():
        if importlib.util.find_spec(module) is None:
            reasons[marker] = f"needs {module}, see torch_rpa/vllm/README.md"
    reason = reason_without_tpu(
        os.environ.get("RPA_TEST_TPU"),
        is_worker="PYTEST_XDIST_WORKER" in os.environ,
        has_device=machine.has_tpu(),
    )
    if reason is not None:
        reasons["tpu"] = reason
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))

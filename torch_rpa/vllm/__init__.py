"""The operator inside vLLM 0.13, the last release that runs on PyTorch/XLA.

vLLM finds ``register`` by an entry point, and then takes ``platform.RpaPlatform`` for
the machine's platform. Scheduler, input batches, sampler and server are those of vLLM.
Of its classes for PyTorch/XLA four are replaced:

=============  ========================================================
``platform``   what is served, and what is refused by name
``worker``     the device, and how much memory the cache may take
``runner``     the cache in the kernel's layout; decodes first in a step
``attention``  one call of the operator in the place of two kernels
=============  ========================================================

Their mixture of experts knows one activation and needs a TPU; ``experts`` is in its
place. Nothing here imports vLLM before vLLM itself asks for it.
"""

import importlib.metadata
import importlib.util
import logging

SERIES = "0.13"
DISTRIBUTIONS = ("vllm", "vllm-tpu")

_logger = logging.getLogger(__name__)


def register() -> str | None:
    """Returns the class of the platform, or None where this vLLM cannot use it.

    vLLM calls it in every environment that has this package, so it must decline
    without an error: another release, one that runs on JAX, or no PyTorch/XLA.
    """
    reason = reason_against()
    if reason is None:
        return f"{__name__}.platform.RpaPlatform"
    _logger.info("torch_rpa.vllm is not used: %s", reason)
    return None


def reason_against() -> str | None:
    """Returns why the platform does not fit this environment, or None if it does."""
    versions = dict(_installed(DISTRIBUTIONS))
    if not any(_is_of_series(version) for version in versions.values()):
        return f"it is for vLLM {SERIES}, found {versions or 'none'}"
    for module in ("torch_xla", "tpu_info"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    if importlib.util.find_spec("tpu_inference") is not None:
        return "vLLM runs on JAX where tpu_inference is installed: uninstall it"
    return None


def _installed(names: tuple[str, ...]):
    for name in names:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _is_of_series(version: str) -> bool:
    return version.split(".")[:2] == SERIES.split(".")

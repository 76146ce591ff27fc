"""What is installed and set, read once, for checks that are pure functions of it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping

from jax_kernels import machine
from torch_rpa.bridges import BRIDGES

PACKAGES = (
    "torch-rpa",
    "torch",
    *(entry.framework for entry in BRIDGES.values()),
    "jax",
    "jaxlib",
    "libtpu",
    "libtpu-nightly",
    "transformers",
    "numpy",
)
# Environment variables that change what runs. Values of those that name files are not
# told.
VARIABLES = (
    "PJRT_DEVICE",
    "JAX_PLATFORMS",
    "LIBTPU_INIT_ARGS",
    "TPU_ACCELERATOR_TYPE",
    "TPU_LIBRARY_PATH",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "TORCH_RPA_EAGER_DONATION",
    "TORCH_RPA_TUNED_BLOCK_SIZES",
    "TORCH_RPA_VALIDATE",
)


@dataclasses.dataclass(frozen=True)
class Installation:
    """What versions and settings are judged by.

    Attributes:
        python: As in ``"3.11.9"``.
        versions: Of ``PACKAGES``; those that are missing are left out.
        variables: Of ``VARIABLES``; those that are not set are left out.
        has_tpu: Whether the machine has a TPU device.
        system: Operating system and processor.
    """

    python: str
    versions: Mapping[str, str]
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    has_tpu: bool = False
    system: str = "Linux x86_64"


def read() -> Installation:
    """Reads it of this process."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Installation(
        python=".".join(map(str, sys.version_info[:3])),
        versions=versions,
        variables={n: os.environ[n] for n in VARIABLES if n in os.environ},
        has_tpu=machine.has_tpu(),
        system=f"{platform.system()} {platform.machine()}",
    )

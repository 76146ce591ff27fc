"""Which releases of transformers are supported, checked before any is imported."""

from __future__ import annotations

import importlib.metadata
import re

OLDEST, TOO_NEW = (4, 57), (6, 0)


def require_supported() -> None:
    """Raises ImportError unless a supported release of transformers is installed."""
    wanted = f"transformers>={_dotted(OLDEST)},<{_dotted(TOO_NEW)}"
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"torch_rpa.transformers needs {wanted}, got none: "
            "pip install 'torch-rpa[hf]'"
        ) from error
    if not OLDEST <= _major_minor(version) < TOO_NEW:
        raise ImportError(f"torch_rpa.transformers needs {wanted}, got {version}")


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", version)[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))

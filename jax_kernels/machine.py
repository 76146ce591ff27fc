"""What the machine shows of its TPU without opening it, since one process may hold it.

The module needs neither JAX nor torch.
"""

from __future__ import annotations

from pathlib import Path


def has_tpu(root: Path = Path("/dev")) -> bool:
    """Whether the kernel of this machine has a TPU device.

    Args:
      root: Where device files are.
    """
    # vfio/vfio is only the driver; a numbered group is a device.
    return (root / "accel0").exists() or any(
        path.name.isdigit() for path in root.glob("vfio/*")
    )

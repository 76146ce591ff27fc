"""Ragged paged attention for PyTorch on TPUs.

Importing this package registers ``torch.ops.rpa.ragged_paged_attention`` and needs only
torch: torch_xla or torch_tpu and JAX are imported by the first call that uses them.
"""

import importlib
import importlib.metadata
import os
import sys
from typing import TYPE_CHECKING, Any

__all__ = [
    "KVScales",
    "__version__",
    "cascade_attention",
    "empty_kv_cache",
    "kv_cache_shape",
    "measure_kv_scales",
    "merge_attention",
    "ragged_paged_attention",
    "read_kv_scales",
    "tuned_block_sizes",
    "unpack_kv_cache",
]


def _is_on_the_way_to_the_command_line() -> bool:
    """Whether Python imports this package to run ``torch_rpa.generate`` inside it.

    That one reads its options first and imports ``torch_rpa.public`` then, so that
    ``--help`` does not wait for torch. While Python looks for the module of ``-m``,
    the name of the program is ``-m``; the installed script has a name of its own.
    """
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    if program == "-m":
        return "torch_rpa.generate" in sys.orig_argv
    return os.path.basename(program) == "torch-rpa-generate"


if TYPE_CHECKING or not _is_on_the_way_to_the_command_line():
    from torch_rpa.public import KVScales as KVScales
    from torch_rpa.public import cascade_attention as cascade_attention
    from torch_rpa.public import empty_kv_cache as empty_kv_cache
    from torch_rpa.public import kv_cache_shape as kv_cache_shape
    from torch_rpa.public import measure_kv_scales as measure_kv_scales
    from torch_rpa.public import merge_attention as merge_attention
    from torch_rpa.public import ragged_paged_attention as ragged_paged_attention
    from torch_rpa.public import read_kv_scales as read_kv_scales
    from torch_rpa.public import tuned_block_sizes as tuned_block_sizes
    from torch_rpa.public import unpack_kv_cache as unpack_kv_cache
else:

    def __getattr__(name: str) -> Any:
        """Returns a name of the package that was left for later."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module("torch_rpa.public"), name)


try:
    __version__ = importlib.metadata.version("torch-rpa")
except importlib.metadata.PackageNotFoundError:
    __version__ = "unknown"  # a source tree that is on the path, but not installed

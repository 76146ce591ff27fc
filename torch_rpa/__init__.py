"""Ragged paged attention for PyTorch on TPUs.

Importing this package registers ``torch.ops.rpa.ragged_paged_attention`` and needs only
torch: torch_xla or torch_tpu and JAX are imported by the first call that uses them.
"""

import importlib.metadata

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        "torch_rpa needs PyTorch, which is not installed: run "
        "`pip install 'torch-rpa[torchtpu]'` for PyTorch with TorchTPU, or "
        "`pip install 'torch-rpa[xla]'` for PyTorch/XLA. Without PyTorch, use the "
        "JAX function jax_kernels.ragged_paged_attention.ragged_paged_attention"
    ) from error

from torch_rpa.api import ragged_paged_attention as ragged_paged_attention
from torch_rpa.kv_cache import empty_kv_cache as empty_kv_cache
from torch_rpa.kv_cache import kv_cache_shape as kv_cache_shape
from torch_rpa.kv_cache import unpack_kv_cache as unpack_kv_cache
from torch_rpa.tuned import tuned_block_sizes as tuned_block_sizes

__all__ = [
    "__version__",
    "empty_kv_cache",
    "kv_cache_shape",
    "ragged_paged_attention",
    "tuned_block_sizes",
    "unpack_kv_cache",
]

try:
    __version__ = importlib.metadata.version("torch-rpa")
except importlib.metadata.PackageNotFoundError:
    __version__ = "unknown"  # a source tree that is on the path, but not installed

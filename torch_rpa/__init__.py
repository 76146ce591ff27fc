"""Ragged paged attention for PyTorch/XLA.

Importing this package registers ``torch.ops.rpa.ragged_paged_attention`` and needs only
torch: torch_xla and JAX are imported by the first call that uses them.
"""

from torch_rpa.api import ragged_paged_attention as ragged_paged_attention
from torch_rpa.kv_cache import empty_kv_cache as empty_kv_cache
from torch_rpa.kv_cache import kv_cache_shape as kv_cache_shape
from torch_rpa.kv_cache import unpack_kv_cache as unpack_kv_cache

__all__ = [
    "empty_kv_cache",
    "kv_cache_shape",
    "ragged_paged_attention",
    "unpack_kv_cache",
]

"""The names of the package itself; importing this room registers the operator.

``torch_rpa`` imports it at once, unless Python only looks for the command line there:
``--help`` need not wait for torch.
"""

from __future__ import annotations

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
from torch_rpa.cascade import cascade_attention as cascade_attention
from torch_rpa.checkpoint_scales import read_kv_scales as read_kv_scales
from torch_rpa.kv_cache import empty_kv_cache as empty_kv_cache
from torch_rpa.kv_cache import kv_cache_shape as kv_cache_shape
from torch_rpa.kv_cache import unpack_kv_cache as unpack_kv_cache
from torch_rpa.merging import merge_attention as merge_attention
from torch_rpa.scales import KVScales as KVScales
from torch_rpa.scales import measure_kv_scales as measure_kv_scales
from torch_rpa.tuned import tuned_block_sizes as tuned_block_sizes

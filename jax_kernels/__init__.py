"""Attention kernels for TPUs in JAX. Public names are re-exported here."""

from jax_kernels.ragged_paged_attention import BlockSizes as BlockSizes
from jax_kernels.ragged_paged_attention import kv_cache_shape as kv_cache_shape
from jax_kernels.ragged_paged_attention import pack_kv_cache as pack_kv_cache
from jax_kernels.ragged_paged_attention import (
    ragged_paged_attention as ragged_paged_attention,
)
from jax_kernels.ragged_paged_attention import (
    ragged_paged_attention_reference as ragged_paged_attention_reference,
)
from jax_kernels.ragged_paged_attention import unpack_kv_cache as unpack_kv_cache

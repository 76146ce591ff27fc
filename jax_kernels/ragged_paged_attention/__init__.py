"""Ragged paged attention: a Pallas TPU kernel, its cache layout and its reference."""

from jax_kernels.ragged_paged_attention.api import (
    ragged_paged_attention as ragged_paged_attention,
)
from jax_kernels.ragged_paged_attention.config import BlockSizes as BlockSizes
from jax_kernels.ragged_paged_attention.layout import kv_cache_shape as kv_cache_shape
from jax_kernels.ragged_paged_attention.layout import pack_kv_cache as pack_kv_cache
from jax_kernels.ragged_paged_attention.layout import unpack_kv_cache as unpack_kv_cache
from jax_kernels.ragged_paged_attention.merging import (
    merge_attention as merge_attention,
)
from jax_kernels.ragged_paged_attention.reference import (
    ragged_paged_attention_reference as ragged_paged_attention_reference,
)

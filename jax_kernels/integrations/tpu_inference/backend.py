"""The engine's interface of an attention backend."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# tpu-inference has an environment of its own.

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from tpu_inference import envs
from tpu_inference.core import disagg_utils
from tpu_inference.layers.common.attention_backend import AttentionBackend
from tpu_inference.layers.common.sharding import ShardingAxisName

from jax_kernels.integrations.tpu_inference import cache_shape, sharded


class TorchRpaAttention(AttentionBackend):
    """Attention of decoder layers, and the shape of their cache.

    Raises:
        ValueError: Another kernel is asked for by a variable of the environment.
    """

    def __init__(self) -> None:
        if envs.USE_BATCHED_RPA_KERNEL:
            # With it the engine also counts other sequences as decoding.
            raise ValueError(
                "USE_BATCHED_RPA_KERNEL must be unset with --attention-backend "
                "torch_rpa, got 1"
            )

    def get_kv_cache_shape(
        self,
        total_num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        kv_dtype: Any,
    ) -> tuple[int, ...]:
        """Returns the shape of the cache of one shard, see ``cache_shape``.

        Raises:
            NotImplementedError: The engine would move parts of pages, and cannot.
        """
        shape = cache_shape.engine_shape(
            total_num_pages, page_size, num_kv_heads, head_dim, jnp.dtype(kv_dtype).name
        )
        if disagg_utils.is_disagg_enabled() and not cache_shape.has_pages_on_axis_1(
            shape
        ):
            raise NotImplementedError(
                "torch_rpa disaggregates prefill where 4 bytes are filled by an even "
                f"number of heads, got {num_kv_heads} key heads of a shard in "
                f"{jnp.dtype(kv_dtype).name}: unset PREFILL_SLICES"
            )
        return shape

    def attention(
        self,
        kv_cache: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        md: Any,
        shared_md: Any,
        mesh: jax.sharding.Mesh,
        *,
        head_dim_original: int,
        sm_scale: float,
        attention_chunk_size: int | None,
        q_scale: float | None,
        k_scale: float | None,
        v_scale: float | None,
        sinks: jax.Array | None,
        update_kv_cache: bool,
        use_causal_mask: bool,
        attn_logits_soft_cap: float | None,
        decode_query_size: int,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the cache and the output; see the engine's ``attention``.

        What it calls ``attention_chunk_size`` is the sliding window.
        """
        del head_dim_original  # sm_scale follows from it
        out, kv_cache = sharded.attend(
            q,
            k,
            v,
            kv_cache,
            sharded.Step(
                shared_md.seq_lens,
                md.block_tables,
                shared_md.query_start_loc,
                shared_md.request_distribution,
            ),
            sinks,
            mesh=mesh,
            axes=sharded.Axes(ShardingAxisName.ATTN_DATA, ShardingAxisName.ATTN_HEAD),
            sm_scale=sm_scale,
            causal=use_causal_mask,
            sliding_window=attention_chunk_size,
            soft_cap=attn_logits_soft_cap,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            update_kv_cache=update_kv_cache,
            decode_query_size=decode_query_size,
        )
        return kv_cache, out

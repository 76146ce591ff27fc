"""The attention of a layer in vLLM: one call of the operator."""

# pyright: reportMissingImports=false
# vLLM has an environment of its own.

from __future__ import annotations

from typing import Any

import torch
from vllm.attention.backends.abstract import AttentionType
from vllm.v1.attention.backends import pallas

from torch_rpa import ops, spmd  # noqa: F401  # ops registers the operator
from torch_rpa.vllm.steps import distribution_of


class RpaBackend(pallas.PallasAttentionBackend):
    """vLLM's backend for PyTorch/XLA with another implementation.

    It keeps the name, which vLLM looks up in a list of its own.
    """

    @staticmethod
    def get_impl_cls() -> type[RpaAttention]:
        """Returns the implementation."""
        return RpaAttention


class RpaAttention(pallas.PallasAttentionBackendImpl):
    """Attends with ``torch.ops.rpa.ragged_paged_attention``, which writes the cache."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """See vLLM's ``AttentionImpl``; ``sinks`` are ``[num_heads]``.

        They are a parameter of the model, whose weights are loaded later.
        """
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap or None,  # some models write 0 for none
            attn_type,
            kv_sharing_target_layer_name,
        )
        self.sinks = sinks
        # Set by the runner where heads are sharded over several devices.
        self.mesh: Any = None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes new keys and values to the cache, and attends to it.

        Args:
            layer: vLLM's layer, which has the scales of its keys and values.
            query: ``[T, Hq * D]``.
            key: ``[T, Hkv * D]``.
            value: ``[T, Hkv * D]``.
            kv_cache: The cache of the layer, or an empty tensor where vLLM measures
                the memory that a step takes without one.
            attn_metadata: vLLM's ``PallasMetadata``.
            output: Unused: the result is returned.
            output_scale: Must be None.
            output_block_scale: Must be None.

        Returns:
            ``[T, Hq * D]``.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "torch_rpa.vllm does not quantise outputs, got output_scale: quantise "
                "weights alone"
            )
        if kv_cache.numel() == 0:
            return torch.ones_like(query)
        num_tokens, width = query.shape
        key_shape = (num_tokens, self.num_kv_heads, self.head_size)
        out = self._attend(
            query.view(num_tokens, self.num_heads, self.head_size),
            key.view(key_shape),
            value.view(key_shape),
            kv_cache,
            attn_metadata.context_lens,
            attn_metadata.block_tables.flatten(),
            attn_metadata.query_start_loc,
            distribution_of(attn_metadata.query_start_loc, attn_metadata.num_seqs),
            None if self.sinks is None else self.sinks.float(),
            sm_scale=self.scale,
            sliding_window=self.sliding_window,
            soft_cap=self.logits_soft_cap,
            **self._scales(layer),
            update_kv_cache=self.kv_sharing_target_layer_name is None,
        )
        return out.reshape(num_tokens, width)

    def _scales(self, layer: Any) -> dict[str, float]:
        """The scales of the checkpoint, 1 where it has none, for an 8-bit cache."""
        dtype = self.kv_cache_quantized_dtype
        if dtype is None or dtype.itemsize > 1:
            return {}
        return {"k_scale": layer._k_scale_float, "v_scale": layer._v_scale_float}

    def _attend(self, *tensors: Any, **options: Any) -> torch.Tensor:
        if self.mesh is None:
            return torch.ops.rpa.ragged_paged_attention(*tensors, **options)
        return spmd.sharded_ragged_paged_attention(
            *tensors, mesh=self.mesh, axis="x", **options
        )

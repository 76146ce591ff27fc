"""The cache that vLLM's runner makes, and the order of the sequences of a step."""

# pyright: reportMissingImports=false
# vLLM has an environment of its own.

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch_xla
from vllm.attention.layers.chunked_local_attention import ChunkedLocalAttention
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backends.utils import reorder_batch_to_split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, MLAAttentionSpec
from vllm.v1.worker.tpu_model_runner import TPUModelRunner
from vllm.v1.worker.utils import bind_kv_cache

import torch_rpa
from torch_rpa import spmd
from torch_rpa.vllm.memory import stored_head_dim


class RpaModelRunner(TPUModelRunner):
    """vLLM's runner for PyTorch/XLA with the kernel's cache."""

    def load_model(self) -> None:
        """Loads the weights; with SPMD the model then runs in lazy mode.

        A sharded call is a manual region of XLA, which torch.compile does not trace.
        """
        super().load_model()
        if self.use_spmd:
            is_multimodal = self.model_config.is_multimodal_model
            owner = self.model.language_model if is_multimodal else self.model
            owner.model = owner.model._orig_mod

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """Returns what vLLM shall know of each layer's cache.

        From it vLLM computes the bytes of a page, so ``head_size`` is what a page holds
        of a head.
        """
        for name, layer in self._attention_layers().items():
            if isinstance(layer, ChunkedLocalAttention):
                raise NotImplementedError(
                    f"torch_rpa.vllm does not support chunked attention, got it in "
                    f"{name}: vLLM on JAX has models with it"
                )
        return {
            name: dataclasses.replace(spec, head_size=stored_head_dim(spec.head_size))
            for name, spec in super().get_kv_cache_spec().items()
        }

    def initialize_kv_cache(self, kv_cache_config: Any) -> None:
        """Makes one cache for each layer and gives it to the layer.

        Args:
            kv_cache_config: vLLM's ``KVCacheConfig``, bytes of each layer and its kind.

        Raises:
            NotImplementedError: Layers need page tables of their own.
        """
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise NotImplementedError(
                "torch_rpa.vllm has one page table for all layers, got "
                f"{len(kv_cache_config.kv_cache_groups)} kinds of layers: leave out "
                "--no-disable-hybrid-kv-cache-manager"
            )
        (group,) = kv_cache_config.kv_cache_groups
        sizes = {
            name: tensor.size
            for tensor in kv_cache_config.kv_cache_tensors
            for name in tensor.shared_by
        }
        caches = {
            name: self._make_cache(group.kv_cache_spec, sizes[name])
            for name in group.layer_names
        }
        torch_xla.sync()  # or making them would be a part of the first step
        self.maybe_setup_cross_layer_kv_sharing(caches, kv_cache_config)
        layers = self.vllm_config.compilation_config.static_forward_context
        bind_kv_cache(caches, layers, self.kv_caches)
        if self.use_spmd:
            for name in caches:
                layers[name].impl.mesh = self.mesh

    def _make_cache(self, spec: Any, num_bytes: int) -> torch.Tensor:
        if not isinstance(spec, AttentionSpec) or isinstance(spec, MLAAttentionSpec):
            raise NotImplementedError(
                f"torch_rpa.vllm has caches of keys and values, got {spec}: serve this "
                "model with vLLM on JAX"
            )
        sizes = (
            num_bytes // spec.page_size_bytes,
            spec.block_size,
            spec.num_kv_heads,
            spec.head_size,
        )
        if self.use_spmd:
            return spmd.empty_sharded_kv_cache(
                *sizes, mesh=self.mesh, axis="x", dtype=spec.dtype
            )
        return torch_rpa.empty_kv_cache(*sizes, dtype=spec.dtype, device=self.device)

    def _update_states(self, scheduler_output: Any) -> bool:
        """Takes up what the scheduler says, and puts sequences that decode first."""
        changed = super()._update_states(scheduler_output)
        if not scheduler_output.total_num_scheduled_tokens:
            return changed
        return (
            reorder_batch_to_split_decodes_and_prefills(
                self.input_batch, scheduler_output
            )
            or changed
        )

    def _attention_layers(self) -> dict[str, Any]:
        return get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)

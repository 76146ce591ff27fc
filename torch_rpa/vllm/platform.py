"""What vLLM asks its platform: which classes serve, and what is refused."""

# pyright: reportMissingImports=false
# vLLM has an environment of its own.

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms.tpu import TpuPlatform

from jax_kernels.contract import cache
from torch_rpa.vllm import refusals
from torch_rpa.vllm.memory import choose_page_size

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_IN_TREE_WORKER = "vllm.v1.worker.tpu_worker.TPUWorker"


class RpaPlatform(TpuPlatform):
    """vLLM's platform for PyTorch/XLA, with this project's operator."""

    @classmethod
    def get_attn_backend_cls(cls, selected_backend: Any, attn_selector_config: Any):
        """Returns the name of the backend of each layer; raises if none can serve."""
        refusals.check_layer(attn_selector_config)
        return "torch_rpa.vllm.attention.RpaBackend"

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        """Returns the name of the chip, or of the XLA device that stands in for one."""
        device = os.environ.get("PJRT_DEVICE", "TPU")
        return super().get_device_name(device_id) if device == "TPU" else device

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Refuses what is not supported, and keeps two choices that vLLM overrides.

        They are float32, which the operator takes too, and the size of a page.
        """
        refusals.check_config(vllm_config)
        model, cache_config = vllm_config.model_config, vllm_config.cache_config
        page_size, dtype = cache_config.block_size, model.dtype
        super().check_and_update_config(vllm_config)
        if dtype == torch.float32:
            model.dtype = dtype
        cache_config.block_size = page_size or choose_page_size(
            model.max_model_len, vllm_config.scheduler_config.max_num_seqs
        )
        cache.check_page_size(cache_config.block_size)
        if refusals.uses_spmd():  # see RpaModelRunner.load_model
            from vllm.config import CompilationMode

            vllm_config.compilation_config.mode = CompilationMode.NONE
        parallel = vllm_config.parallel_config
        if parallel.worker_cls == _IN_TREE_WORKER:
            parallel.worker_cls = "torch_rpa.vllm.worker.RpaWorker"

    @classmethod
    def validate_request(cls, prompt: Any, params: Any, processed_inputs: Any) -> None:
        """Raises if the sampler on the device would leave out what is asked for."""
        super().validate_request(prompt, params, processed_inputs)
        refusals.check_request(params)

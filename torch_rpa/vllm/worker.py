"""The device of a worker of vLLM, and how much memory the cache may take."""

# pyright: reportMissingImports=false
# vLLM has an environment of its own.

from __future__ import annotations

import os
from unittest import mock

import torch_xla
import torch_xla.runtime
import vllm.envs
from vllm.v1.worker import tpu_worker

from torch_rpa.vllm import fused_moe
from torch_rpa.vllm.memory import without_padding
from torch_rpa.vllm.runner import RpaModelRunner

# Where the XLA device is the CPU: GiB of a cache, if VLLM_CPU_KVCACHE_SPACE is not set.
_CPU_CACHE_GIB = 1


class RpaWorker(tpu_worker.TPUWorker):
    """vLLM's worker for PyTorch/XLA, which also runs on the XLA CPU device."""

    def init_device(self) -> None:
        """Opens the device that PJRT_DEVICE names, a TPU by default."""
        fused_moe.register()
        device = os.environ.get("PJRT_DEVICE", "TPU")
        if device != "TPU":
            # vLLM sets the variable to TPU. It is read when the device is opened.
            if self.use_spmd:
                torch_xla.runtime.use_spmd()
            torch_xla.runtime.global_runtime_device_count()
        # vLLM looks its runner up by this name, and has no option for another one.
        with mock.patch.object(tpu_worker, "TPUModelRunner", RpaModelRunner):
            super().init_device()
        os.environ["PJRT_DEVICE"] = device

    def determine_available_memory(self) -> int:
        """Returns bytes that the caches of all layers may take.

        On a TPU vLLM runs the largest step and measures what is left. The memory of a
        machine says nothing of that of a chip, so on the CPU the variable
        VLLM_CPU_KVCACHE_SPACE says how much.
        """
        if os.environ["PJRT_DEVICE"] != "TPU":
            return (vllm.envs.VLLM_CPU_KVCACHE_SPACE or _CPU_CACHE_GIB) << 30
        available = super().determine_available_memory()
        return without_padding(available, self.model_config.get_head_size())

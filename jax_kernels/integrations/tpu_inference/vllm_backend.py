"""The classes that vLLM gives to the layers of a model."""

# pyright: reportMissingImports=false
# tpu-inference has an environment of its own.

from __future__ import annotations

from typing import Any

from tpu_inference.layers.vllm.backends.flash_attn import (
    PallasAttentionBackend,
    PallasAttentionBackendImpl,
)

from jax_kernels.integrations.tpu_inference import NAME


class TorchRpaImpl(PallasAttentionBackendImpl):
    """The engine's layer, which calls the backend of this name.

    Raises:
        NotImplementedError: The layer bounds its scores. The engine leaves out the
            bound on the way to any backend, and its answers would be wrong.
    """

    attention_backend = NAME

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.logits_soft_cap:
            raise NotImplementedError(
                "tpu-inference does not pass the bound of scores of a layer on, got "
                f"logits_soft_cap={self.logits_soft_cap}: use torch_rpa.serving, or "
                "torch_rpa.vllm"
            )


class TorchRpaBackend(PallasAttentionBackend):
    """The engine's backend with the layer above."""

    @staticmethod
    def get_name() -> str:
        """Returns the name under which vLLM lists it."""
        return NAME.upper()

    @staticmethod
    def get_impl_cls() -> type[TorchRpaImpl]:
        """Returns the layer."""
        return TorchRpaImpl

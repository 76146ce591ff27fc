"""What vLLM makes of a layer of experts, in the place of its own class for XLA."""

# pyright: reportMissingImports=false
# vLLM has an environment of its own.

from __future__ import annotations

from typing import Any

import torch
import torch_xla.runtime
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from torch_rpa.vllm.experts import mix_experts

# Attributes of a layer that must have these values; another one is refused.
_EXPECTED = {
    "use_grouped_topk": False,
    "custom_routing_function": None,
    "scoring_func": "softmax",
    "e_score_correction_bias": None,
    "apply_router_weight_on_input": False,
    "routed_scaling_factor": 1.0,
    "enable_eplb": False,
    "expert_map": None,
}


def register() -> None:
    """Makes vLLM take the class below for experts without quantisation."""
    if UnquantizedFusedMoEMethod.__name__ not in CustomOp.op_registry_oot:
        UnquantizedFusedMoEMethod.register_oot(RpaExperts)


class RpaExperts(UnquantizedFusedMoEMethod):
    """vLLM's grouped products on a TPU where they serve, and else plain PyTorch.

    Those know SiLU without biases, and need a TPU.
    """

    def forward_tpu(
        self, layer: Any, x: torch.Tensor, router_logits: torch.Tensor
    ) -> torch.Tensor:
        """Returns ``[T, H]`` for tokens ``[T, H]`` and logits ``[T, E]``.

        Raises:
            NotImplementedError: The layer routes in another way.
        """
        for name, expected in _EXPECTED.items():
            if getattr(layer, name) != expected:
                raise NotImplementedError(
                    f"torch_rpa.vllm routes to experts with {name}={expected!r}, got "
                    f"{getattr(layer, name)!r}: use torch_rpa.serving, which runs the "
                    "experts of transformers"
                )
        is_plain = layer.activation == "silu" and not self.moe.has_bias
        if is_plain and torch_xla.runtime.device_type() == "TPU":
            return super().forward_native(layer, x, router_logits)
        return mix_experts(
            x,
            router_logits,
            layer.w13_weight,
            layer.w2_weight,
            top_k=layer.top_k,
            renormalize=layer.renormalize,
            activation=layer.activation,
            bias13=getattr(layer, "w13_bias", None),
            bias2=getattr(layer, "w2_bias", None),
        )

    forward_native = forward_tpu

"""A mixture of experts in plain PyTorch, for what vLLM's XLA path does not compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Of GPT-OSS: how steep the gate is, and where gate and values are cut off.
_GATE_SLOPE = 1.702
_LIMIT = 7.0


def mix_experts(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    *,
    top_k: int,
    renormalize: bool,
    activation: str,
    bias13: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns what the chosen experts make of each token, weighted.

    Every expert is computed for every token. In decode that costs little, since the
    weights of most experts are read anyway. A long prefill does ``E / top_k`` times the
    arithmetic that it needs.

    Args:
        x: ``[T, H]``.
        router_logits: ``[T, E]``.
        w13: ``[E, 2 * I, H]``, gates and values.
        w2: ``[E, H, I]``.
        top_k: Experts of each token.
        renormalize: Whether the weights of the chosen experts add up to 1.
        activation: ``"silu"``, for which gates come before values, or ``"swigluoai"``,
            for which they alternate.
        bias13: ``[E, 2 * I]``.
        bias2: ``[E, H]``.

    Returns:
        ``[T, H]``.

    Raises:
        NotImplementedError: Another activation.
    """
    weights = router_logits.softmax(dim=-1, dtype=torch.float32)
    chosen, index = weights.topk(top_k, dim=-1)
    if renormalize:
        chosen = chosen / chosen.sum(dim=-1, keepdim=True)
    weights = torch.zeros_like(weights).scatter(1, index, chosen)
    hidden = torch.matmul(x[None], w13.transpose(1, 2))  # [E, T, 2 * I]
    if bias13 is not None:
        hidden = hidden + bias13[:, None]
    out = torch.matmul(_activate(hidden, activation), w2.transpose(1, 2))  # [E, T, H]
    if bias2 is not None:
        out = out + bias2[:, None]
    return (out * weights.T[:, :, None].to(out.dtype)).sum(dim=0)


def _activate(hidden: torch.Tensor, activation: str) -> torch.Tensor:
    """``[..., 2 * I]`` to ``[..., I]``."""
    if activation == "silu":
        gate, values = hidden.chunk(2, dim=-1)
        return F.silu(gate) * values
    if activation == "swigluoai":
        gate = hidden[..., ::2].clamp(max=_LIMIT)
        values = hidden[..., 1::2].clamp(-_LIMIT, _LIMIT)
        return gate * torch.sigmoid(gate * _GATE_SLOPE) * (values + 1)
    raise NotImplementedError(
        f"torch_rpa.vllm has experts with 'silu' and 'swigluoai', got {activation!r}: "
        "use torch_rpa.serving, which runs the experts of transformers"
    )

"""What a model call needs besides its inputs: the ragged batch and the paged caches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

import torch_rpa
from torch_rpa.layer_scales import LayerScales
from torch_rpa.transformers.guards import guard, refuse_float16


class AttentionModule(Protocol):
    """What an attention module of transformers says about itself."""

    config: Any
    layer_idx: int
    head_dim: int
    num_key_value_groups: int
    training: bool


class RaggedBatch(NamedTuple):
    """Which tokens of a step belong to which sequence, and where its pages are.

    All are int32 tensors on the device of the model. Entries at or past the number of
    live sequences, and page ids past a sequence's last live page, are padding.
    """

    kv_lens: torch.Tensor  # [S] tokens of each sequence, those of this step included
    page_indices: torch.Tensor  # [S * P] row-major page table
    cu_q_lens: torch.Tensor  # [S + 1] where the tokens of each sequence start
    distribution: torch.Tensor  # [3] ends of the decode, prefill and live ranges


@dataclasses.dataclass(frozen=True, eq=False)
class RPAContext:
    """The argument ``rpa=`` of a model call.

    Attributes:
        kv_caches: One paged cache for each layer, updated in place by the call.
        batch: The ragged batch, shared by all layers.
        k_scale: The caches store ``key / k_scale``; None is 1. A number for all layers,
            which is a part of the compiled program; or, on the device of the model,
            a float32 tensor ``[layers]`` or ``[layers, Hkv]``, or a sequence of tensors
            ``[]`` or ``[Hkv]``. Numbers in a sequence are parts of the program as well.
        v_scale: The caches store ``value / v_scale`` likewise.
        decode_q_len: Most new tokens of a sequence of the decode range of the batch.
            More than one serves drafts that a model checks.
        probabilities_dtype: To which probabilities may be rounded in prefill.
        batch_invariant: Whether a query gets the same bits from the operator in any
            batch. What a model does between its layers is its own affair.
        attention: The operator, or a function of the same arguments, such as
            ``torch_rpa.spmd.sharded_ragged_paged_attention`` with its mesh. Scales that
            are tensors are its ``k_scales`` and ``v_scales``.
        window: Keys and values that are farther back may be gone: a layer that sees
            more than so many tokens raises. None says that all are there.
        layers_done: Layers that the present model call has computed.
        checked_by: Models that have checked the arguments beside this one.
    """

    kv_caches: Sequence[torch.Tensor]
    batch: RaggedBatch
    k_scale: LayerScales | None = None
    v_scale: LayerScales | None = None
    decode_q_len: int = 1
    probabilities_dtype: torch.dtype | None = None
    batch_invariant: bool = False
    attention: Callable[..., torch.Tensor] = torch.ops.rpa.ragged_paged_attention
    window: int | None = None
    layers_done: set[int] = dataclasses.field(default_factory=set, init=False)
    checked_by: set[str] = dataclasses.field(default_factory=set, init=False)


def empty_kv_caches(
    model: nn.Module,
    num_pages: int,
    page_size: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> list[torch.Tensor]:
    """Returns one cache of zeros for each attention layer of a transformers model.

    Args:
        model: A causal language model of transformers.
        num_pages: Pages in each cache. One page table serves all layers.
        page_size: Tokens in a page.
        dtype: What keys and values are stored as. With int8 give ``RPAContext`` scales.
        device: Where the caches live. On an XLA device call ``torch_xla.sync()``
            afterwards, so that making them is no part of the first step.

    Raises:
        NotImplementedError: The model is in float16, its layers are not all attention,
            or adapters of PEFT act on whole texts.
    """
    layers = _attention_layers(model)
    guard(model)
    refuse_float16(getattr(model, "dtype", dtype))
    return [
        torch_rpa.empty_kv_cache(
            num_pages,
            page_size,
            _num_key_heads(module),
            module.head_dim,
            dtype=dtype,
            device=device,
        )
        for module in layers
    ]


def num_key_heads(model: nn.Module) -> list[int]:
    """Returns how many key heads each layer has."""
    return [_num_key_heads(module) for module in _attention_layers(model)]


def _attention_layers(model: nn.Module) -> list[AttentionModule]:
    modules: list[Any] = [
        module
        for module in model.modules()
        if hasattr(module, "layer_idx")
        and (hasattr(module, "num_key_value_groups") or hasattr(module, "num_heads"))
    ]
    layers: dict[int, AttentionModule] = {m.layer_idx: m for m in modules}
    if sorted(layers) != list(range(len(layers))) or not layers:
        raise NotImplementedError(
            f"model must have an attention module for each layer, got layers "
            f"{sorted(layers)} in {type(model).__name__}; make its caches with "
            "torch_rpa.empty_kv_cache"
        )
    without = {type(m).__name__ for m in modules if not hasattr(m, "head_dim")}
    if without:
        raise NotImplementedError(
            f"model must have one head_dim for keys and values, got {sorted(without)} "
            f"without it in {type(model).__name__}; use another attn_implementation"
        )
    return [layers[index] for index in range(len(layers))]


def _num_key_heads(module: AttentionModule) -> int:
    # Heads may differ from layer to layer. Older modules have one key head for each.
    num_heads = getattr(module, "num_heads", None) or module.config.num_attention_heads
    return num_heads // getattr(module, "num_key_value_groups", 1)

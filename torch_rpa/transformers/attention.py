"""The attention function that transformers calls in every layer, and its registration.

No mask function is registered with it: transformers then builds no mask, and the
lengths in the context say all that a causal mask would.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from transformers import AttentionInterface, PreTrainedModel

from torch_rpa.layer_scales import LayerScales
from torch_rpa.transformers.context import AttentionModule, RPAContext
from torch_rpa.transformers.guards import (
    ATTENTION_NAME,
    attention_of,
    guard,
    refuse_autocast,
    refuse_float16,
)
from torch_rpa.transformers.missing_scales import warn_of_missing_scales

# Keyword arguments of a model that say nothing about what its attention computes.
_HARMLESS_KWARGS = frozenset(
    {
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
    }
)
_ABSENT: Any = object()

Model = TypeVar("Model", bound=PreTrainedModel)


def register() -> None:
    """Makes ``attn_implementation="rpa"`` known to transformers; may be repeated."""
    AttentionInterface.register(ATTENTION_NAME, rpa_attention)


def use_rpa(model: Model) -> Model:
    """Switches a model to this attention, and returns it.

    Raises:
        NotImplementedError: The model does not take its attention from the registry.
    """
    model.set_attn_implementation(ATTENTION_NAME)
    got = attention_of(model)
    if got != ATTENTION_NAME:
        raise NotImplementedError(
            f"{type(model).__name__} keeps its own attention {got!r}: it does not read "
            "the attention registry of transformers; choose a model that does"
        )
    guard(model)
    return model


def rpa_attention(
    module: AttentionModule,
    query: torch.Tensor,  # [1, Hq, T, D], rotary embedding applied
    key: torch.Tensor,  # [1, Hkv, T, D]
    value: torch.Tensor,  # [1, Hkv, T, D]
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = _ABSENT,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,  # [Hq]
    is_causal: bool | None = None,
    use_cache: bool | None = None,
    rpa: RPAContext | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Appends keys and values to the layer's paged cache and attends to the cache.

    Whatever would change the answer and is not supported raises.

    Returns:
        The attention output ``[1, T, Hq, D]``, and no attention weights.
    """
    _refuse_both_directions(module, is_causal)
    if rpa is None:
        raise ValueError(
            f'rpa must be given with attn_implementation="{ATTENTION_NAME}", got None: '
            "call model(..., rpa=RPAContext(kv_caches, batch), use_cache=False), or "
            "model.generate(..., custom_generate=torch_rpa.transformers.generate)"
        )
    _refuse_unwatched(module, rpa)
    _refuse_caches(query, key, use_cache)
    _refuse_other_heads(module, query, value)
    _refuse_other_meanings(module, attention_mask, dropout, kwargs)
    refuse_float16(query.dtype)
    refuse_autocast(query.device)
    _refuse_a_second_time(module, rpa)
    window = _sliding_window(module, sliding_window)
    _refuse_to_look_too_far(module, window, rpa.window)
    batch, kv_cache = rpa.batch, rpa.kv_caches[module.layer_idx]
    if not torch.compiler.is_compiling():  # a graph cannot warn
        warn_of_missing_scales(kv_cache.dtype, rpa.k_scale, rpa.v_scale)
    out = rpa.attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        kv_cache,
        batch.kv_lens,
        batch.page_indices,
        batch.cu_q_lens,
        batch.distribution,
        None if s_aux is None else s_aux.float(),
        sm_scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=window,
        soft_cap=softcap,
        **_scale_of_layer("k_scale", rpa.k_scale, module.layer_idx, rpa),
        **_scale_of_layer("v_scale", rpa.v_scale, module.layer_idx, rpa),
        decode_q_len=rpa.decode_q_len,
        probabilities_dtype=rpa.probabilities_dtype,
        batch_invariant=rpa.batch_invariant,
    )
    return out[None], None


def _refuse_unwatched(module: AttentionModule, rpa: RPAContext) -> None:
    """Raises if no model has checked what else it is called with, such as masks."""
    if torch.compiler.is_compiling():  # a graph cannot keep such records
        return
    if not rpa.checked_by:
        raise ValueError(
            f"the model around {type(module).__name__} must be watched, since "
            "transformers drops masks and types of tokens that would change the answer:"
            " call torch_rpa.transformers.use_rpa(model) or empty_kv_caches(model, ...)"
        )


def _scale_of_layer(
    name: str, scales: LayerScales | None, layer: int, rpa: RPAContext
) -> dict[str, Any]:
    """Returns the keyword argument of the operator for a layer."""
    # A tuple, since torch.compile does not know unions of types.
    if scales is None or isinstance(scales, (int, float)):
        return {name: scales}
    if not isinstance(scales, torch.Tensor) or scales.dim():
        if len(scales) != len(rpa.kv_caches):
            raise ValueError(
                f"{name} must have an entry for each of the {len(rpa.kv_caches)} "
                f"caches, got {len(scales)}"
            )
        scales = scales[layer]
    if isinstance(scales, torch.Tensor):
        return {f"{name}s": scales}
    if not isinstance(scales, (int, float)):
        raise ValueError(
            f"{name} of layer {layer} must be a number or a tensor [] or [Hkv], got "
            f"{scales!r}"
        )
    return {name: scales}


def _refuse_caches(
    query: torch.Tensor, key: torch.Tensor, use_cache: bool | None
) -> None:
    if use_cache or key.shape[2] != query.shape[2]:
        raise ValueError(
            "use_cache must be False and past_key_values None, since the paged caches "
            f"of rpa= replace them: got {use_cache=}, {query.shape[2]} queries and "
            f"{key.shape[2]} keys"
        )
    if query.shape[0] != 1:
        raise ValueError(
            "input_ids must be [1, T] with all sequences end to end, got batch size "
            f"{query.shape[0]}"
        )


def _refuse_other_heads(
    module: AttentionModule, query: torch.Tensor, value: torch.Tensor
) -> None:
    if query.shape[-1] != value.shape[-1]:
        raise NotImplementedError(
            f"keys and values must have one head_dim, got {query.shape[-1]} and "
            f"{value.shape[-1]} in {type(module).__name__}; use another "
            "attn_implementation for this model"
        )


def _refuse_both_directions(module: AttentionModule, is_causal: bool | None) -> None:
    # By its config transformers makes another mask of a decoder: none reaches here.
    config = getattr(module, "config", None)
    if (
        is_causal is False
        or getattr(module, "is_causal", True) is False
        or not getattr(config, "is_causal", True)
    ):
        raise NotImplementedError(
            f"{type(module).__name__} asks for is_causal=False, as encoders of images "
            "do: only causal attention can be paged; leave images out, or use another "
            "attn_implementation for this module"
        )


def _refuse_other_meanings(
    module: AttentionModule,
    attention_mask: torch.Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> None:
    if attention_mask is not None:
        raise NotImplementedError(
            "attention_mask must be None: the lengths in rpa= replace it, got a mask "
            f"of shape {list(attention_mask.shape)}"
        )
    if module.training or dropout:
        raise NotImplementedError(
            f"{ATTENTION_NAME} is for inference, got training={module.training} and "
            f"{dropout=}: call model.eval()"
        )
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            f"output_attentions must be False, got True: {ATTENTION_NAME} computes no "
            "attention weights; use another attn_implementation to get them"
        )
    unknown = sorted(
        name
        for name, argument in kwargs.items()
        if argument is not None
        and name not in _HARMLESS_KWARGS
        and not _is_of_compressed_tensors(argument)
    )
    if unknown:
        raise NotImplementedError(
            f"{type(module).__name__} passes {unknown} to its attention, which could "
            "change the answer; use another attn_implementation for this model"
        )


def _is_of_compressed_tensors(argument: object) -> bool:
    """Whether it rounds keys and values like a cache in 8 bits, and holds none.

    A checkpoint with scales of its cache gives each attention one of these, which the
    paged cache replaces.
    """
    kind = type(argument)
    module = kind.__module__.partition(".")[0]
    return (module, kind.__name__) == ("compressed_tensors", "QuantizedKVCache")


def _refuse_a_second_time(module: AttentionModule, rpa: RPAContext) -> None:
    """Raises if a layer attends twice in one call; its cache has room for one."""
    if torch.compiler.is_compiling():  # a graph cannot keep such records
        return
    if module.layer_idx in rpa.layers_done:
        raise NotImplementedError(
            f"layer {module.layer_idx} of {type(module).__name__} attends a second time"
            " with one context: make an RPAContext for each model call; if the model "
            "itself attends twice, use another attn_implementation"
        )
    rpa.layers_done.add(module.layer_idx)


def _refuse_to_look_too_far(
    module: AttentionModule, window: int | None, kept: int | None
) -> None:
    if kept is not None and (window is None or window > kept):
        raise NotImplementedError(
            f"layer {module.layer_idx} of {type(module).__name__} must see at most the "
            f"last {kept} tokens, as the config of the model says of all layers, got "
            f"sliding_window {window}; use another attn_implementation for this model"
        )


def _sliding_window(module: AttentionModule, argument: int | None) -> int | None:
    """Returns the window of a layer: what it passes, else what its config says."""
    config = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    layer_type = layer_types[module.layer_idx] if layer_types else None
    # The other layers too: those without attention have no paged state at all.
    others = set(layer_types or ()) - {"full_attention", "sliding_attention"}
    if others:
        raise NotImplementedError(
            f"layers of a model with {type(module).__name__} must have full or sliding "
            f"attention, got {', '.join(map(repr, sorted(others)))}; use another "
            "attn_implementation"
        )
    if argument is not _ABSENT and argument is not None:
        return argument
    configured = getattr(config, "sliding_window", None)
    if layer_type == "sliding_attention":
        return configured
    if layer_type is None and argument is _ABSENT and configured is not None:
        raise NotImplementedError(
            f"{type(module).__name__} has {configured=} and does not pass "
            "sliding_window, so it is unknown which layers slide; use another "
            "attn_implementation for this model"
        )
    return None

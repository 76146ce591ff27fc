"""Refuses model calls that the attention function cannot see to be wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from torch_rpa.transformers.model_arguments import (
    is_empty,
    refuse_attention_in_both_directions,
)
from torch_rpa.transformers.wrappers import innermost, refuse_adapters_of_texts

# transformers gives names with "flash", "sdpa", "paged|" or "/" meanings of their own.
ATTENTION_NAME = "rpa"
# The model's argument for a cache, since transformers 5.24 and before.
_CACHE_NAMES = ("cache", "past_key_values")


def check_attention(model: Any) -> None:
    """Raises unless the model has this attention."""
    got = attention_of(model)
    if got != ATTENTION_NAME:
        raise ValueError(
            f"model must have attn_implementation {ATTENTION_NAME!r}, got {got!r}: "
            "call torch_rpa.transformers.use_rpa(model)"
        )


def guard(model: nn.Module) -> None:
    """Makes calls with ``rpa=`` raise where the context would be ignored or disagree.

    The attention function cannot see either case: it is not called by a model with
    another attention, and transformers drops masks before it. The models inside this
    one that compute text are watched too, for who calls one of them. May be repeated.

    Raises:
        NotImplementedError: Adapters of PEFT act on whole texts.
    """
    refuse_adapters_of_texts(model)
    _before_each_call(model, _check_call)
    for part in _models_of_text_inside(model):
        _before_each_call(part, _check_call_inside)


def _before_each_call(model: nn.Module, check: Callable[..., None]) -> None:
    if check not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(check, with_kwargs=True)


def _models_of_text_inside(model: nn.Module) -> Iterator[PreTrainedModel]:
    text: Any = innermost(model)
    if isinstance(text, PreTrainedModel):
        kind = text.config.get_text_config().model_type
        for part in text.modules():
            if (
                part is not model
                and isinstance(part, PreTrainedModel)
                and part.config.get_text_config().model_type == kind
            ):
                yield part


def _check_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    rpa = kwargs.get("rpa")
    if rpa is not None and not torch.compiler.is_compiling():
        rpa.layers_done.clear()
    _check_call_inside(model, args, kwargs)


def _check_call_inside(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    rpa = kwargs.get("rpa")
    if rpa is None:
        return
    check_attention(model)
    # The second argument of every causal language model's forward.
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    # The model around this one may pass masks of kinds of layers, all of them None.
    if not is_empty(mask):
        raise NotImplementedError(
            "attention_mask must be None: the lengths in rpa= replace it, got "
            f"{type(mask).__name__}; leave padding out of input_ids, or use "
            "torch_rpa.transformers.generate"
        )
    refuse_attention_in_both_directions(model, kwargs)
    cache = cache_among(kwargs)
    if cache is not None:
        raise ValueError(
            "past_key_values must be None: the paged caches of rpa= replace it, got "
            f"{type(cache).__name__}"
        )
    if not torch.compiler.is_compiling():
        rpa.checked_by.add(type(model).__name__)


def refuse_autocast(device: torch.device) -> None:
    """Raises under ``torch.autocast``, which changes the dtype of some keys only."""
    # A device without autocast has no such switch to ask.
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(
        device.type
    ):
        raise NotImplementedError(
            "torch.autocast must be off, since keys, values and their cache need one "
            f"dtype, got it on for {device.type}: load the model with "
            "dtype=torch.bfloat16"
        )


def refuse_float16(dtype: torch.dtype) -> None:
    """Raises for a dtype of models that TPUs do not have."""
    if dtype == torch.float16:
        raise NotImplementedError(
            "the model must be in bfloat16 or float32, got float16: load it with "
            "dtype=torch.bfloat16"
        )


def cache_among(model_kwargs: dict[str, Any]) -> Any:
    """Returns the cache among the arguments of a model, or None."""
    caches = [model_kwargs.get(name) for name in _CACHE_NAMES]
    return next((cache for cache in caches if cache is not None), None)


def attention_of(model: Any) -> str:
    return model.config.get_text_config()._attn_implementation

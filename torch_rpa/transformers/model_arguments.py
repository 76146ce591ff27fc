"""Arguments of a model besides its tokens: which of them could change the answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# What transformers adds to the arguments of a model and a ragged step replaces.
_REPLACED = frozenset(
    {
        "attention_mask",
        "cache",
        "cache_position",
        "logits_to_keep",
        "past_key_values",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
# What the loop of transformers passes to the model, which ignores it.
_OF_THE_LOOP = frozenset({"assistant_tokenizer", "tokenizer"})
_HARMLESS_VALUES: Mapping[str, bool] = {
    "is_causal": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
}
_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
# Families in which tokens of the type 0 attend to each other in both directions.
_PREFIX_IS_TYPE_0 = ("paligemma",)


def refuse_unknown_arguments(model: Any, model_kwargs: Mapping[str, Any]) -> None:
    """Raises if an argument could change an answer that ragged steps give without it.

    Args:
        model: The model.
        model_kwargs: Arguments of its ``forward``.

    Raises:
        NotImplementedError: Names the arguments, such as those that hold images.
    """
    unknown = sorted(
        name
        for name, value in model_kwargs.items()
        if _could_change_the_answer(model, name, value)
    )
    if unknown:
        raise NotImplementedError(
            f"model arguments {unknown} could change the answer and cannot be cut into "
            "ragged steps, which take text alone and no images: leave them out or use "
            "another attn_implementation"
        )


def refuse_attention_in_both_directions(
    model: Any, model_kwargs: Mapping[str, Any]
) -> None:
    """Raises if types of tokens ask for attention that is not causal.

    transformers would say so in a mask, which it does not build for this attention.
    """
    for name in _TOKEN_TYPES:
        types = model_kwargs.get(name)
        if types is None:
            continue
        # A graph has no numbers that could be looked at.
        if torch.compiler.is_compiling() or _marks_a_span(model, types):
            raise NotImplementedError(
                f"{name} must be left out, got types that let tokens attend in both "
                "directions, as those of an image: only causal attention can be paged; "
                "use another attn_implementation"
            )


def is_empty(value: Any) -> bool:
    """Whether there is nothing in it, as in the encoder outputs of no images."""
    if value is None:
        return True
    if isinstance(value, Mapping):
        return all(is_empty(item) for item in value.values())
    return isinstance(value, list | tuple) and all(is_empty(item) for item in value)


def _could_change_the_answer(model: Any, name: str, value: Any) -> bool:
    if name in _REPLACED or name in _OF_THE_LOOP or is_empty(value):
        return False
    if name in _TOKEN_TYPES and isinstance(value, torch.Tensor):
        return _marks_a_span(model, value)
    return _HARMLESS_VALUES.get(name) is not value


def _marks_a_span(model: Any, types: torch.Tensor) -> bool:
    if model.config.model_type in _PREFIX_IS_TYPE_0:
        return bool((types == 0).any())
    return bool(types.any())

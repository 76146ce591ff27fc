"""Rotary embeddings whose factors depend on the longest sequence of a model call.

transformers takes the largest position of a call for the length of all its sequences. A
ragged step has sequences of many lengths, and chunks of longer ones, so its caller has
to see to it that the model finds the right length: by the positions of padding tokens,
and by a call of its own for each length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PreTrainedModel
from transformers.generation import GenerationMixin


class LengthScaling(NamedTuple):
    """How the factors depend on the length of a sequence.

    Attributes:
        unscaled_length: Up to so many tokens they are always the same.
        has_one_switch: Beyond that length there is one other set of factors
            ("longrope"); otherwise every length has its own ("dynamic").
        starts_again: When a text grows beyond that length, transformers computes the
            keys before again. Otherwise they stay as they were.
    """

    unscaled_length: int
    has_one_switch: bool
    starts_again: bool


def length_scaling(model: PreTrainedModel) -> LengthScaling | None:
    """Returns how the factors of a model depend on lengths, or None if they do not."""
    config = model.config.get_text_config()
    parameters = _scaled_parameters(config)
    if parameters is None:
        return None
    has_one_switch = _rope_type(parameters) == "longrope"
    # Families that do so, such as Phi-3, have a method of their own and this field.
    name = "prepare_inputs_for_generation"
    has_own_method = getattr(type(model), name) is not getattr(GenerationMixin, name)
    return LengthScaling(
        _unscaled_length(config, parameters),
        has_one_switch,
        starts_again=has_one_switch
        and has_own_method
        and hasattr(config, "original_max_position_embeddings"),
    )


def refuse_other_factors(scaling: LengthScaling | None, longest: int) -> None:
    """Raises if keys that are computed again would not be what they were before.

    Args:
        scaling: Of the model.
        longest: Tokens of the longest sequence that counts.
    """
    if scaling is None or scaling.starts_again or longest <= scaling.unscaled_length:
        return
    raise NotImplementedError(
        "past_key_values can be cropped, copied or given further turns for this model "
        f"up to {scaling.unscaled_length} tokens, got {longest}: beyond it "
        "transformers scales rotary positions by the length; pass the whole text "
        "without past_key_values"
    )


def unscaled_length(config: Any) -> int | None:
    """Returns up to which length the factors do not depend on it; None is any.

    Args:
        config: A model's text config.
    """
    parameters = _scaled_parameters(config)
    return None if parameters is None else _unscaled_length(config, parameters)


def _scaled_parameters(config: Any) -> dict[str, Any] | None:
    # Of another name before transformers 5; one for each kind of layer in some models.
    name = "rope_parameters" if hasattr(config, "rope_parameters") else "rope_scaling"
    scaling = getattr(config, name, None) or {}
    nested = [value for value in scaling.values() if isinstance(value, dict)]
    for parameters in nested or [scaling]:
        if _rope_type(parameters) in ("dynamic", "longrope"):
            return parameters
    return None


def _rope_type(parameters: dict[str, Any]) -> str | None:
    return parameters.get("rope_type", parameters.get("type"))


def _unscaled_length(config: Any, parameters: dict[str, Any]) -> int:
    # Among the parameters it has a meaning since transformers 5 alone.
    own = parameters if hasattr(config, "rope_parameters") else {}
    return (
        own.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
    )

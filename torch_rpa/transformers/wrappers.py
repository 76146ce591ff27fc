"""Models around a model of transformers: adapters of PEFT, and compiled models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel


def innermost(model: Any) -> PreTrainedModel:
    """Returns the model of transformers inside a compiled one or one with adapters."""
    while True:
        if "_orig_mod" in getattr(model, "_modules", {}):  # torch.compile(model)
            model = model._orig_mod
        elif hasattr(type(model), "get_base_model"):  # of PEFT
            model = model.get_base_model()
        else:
            return model


def refuse_adapters_of_texts(model: Any) -> None:
    """Raises if adapters of PEFT act on whole texts, which ragged steps do not see.

    Adapters of layers, such as LoRA, act on each token alone and are fine.

    Raises:
        NotImplementedError: Prompt learning and the like is active, in ``model`` or in
            the model of PEFT whose ``generate`` is running.
    """
    for config in _active_configs(model):
        acts_on_texts = (
            getattr(config, "is_prompt_learning", False)
            or getattr(config, "is_adaption_prompt", False)
            or getattr(config, "alora_invocation_tokens", None) is not None
        )
        if acts_on_texts:
            kind = getattr(config, "peft_type", config)
            raise NotImplementedError(
                f"adapters must act on single tokens, as LoRA does, got {kind!s}, which"
                " acts on whole texts that a ragged step does not see: use another "
                "adapter, or another attn_implementation"
            )


def _active_configs(model: Any) -> Iterator[Any]:
    """Yields the configs of the adapters that act on a model now."""
    # While it generates, a model of PEFT lends its method to the one inside.
    method = vars(model).get("prepare_inputs_for_generation")
    for wrapper in (model, getattr(method, "__self__", None)):
        if hasattr(type(wrapper), "active_peft_config") and not getattr(
            wrapper, "_adapters_disabled", False
        ):
            yield getattr(wrapper, "active_peft_config", None)
    # Of adapters in its layers, also where transformers has put them there.
    inner: Any = innermost(model)
    configs = vars(inner).get("peft_config") or {}
    for layer in inner.modules() if configs else ():
        if isinstance(getattr(type(layer), "disable_adapters", None), property):
            names = () if layer.disable_adapters else layer.active_adapters
            yield from (configs[name] for name in names if name in configs)

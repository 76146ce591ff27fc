"""The model and its tokenizer: from a directory, or the small built-in one."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from torch_rpa.generate import byte_llama
from torch_rpa.generate.tokenizer import ByteTokenizer, Tokenizer
from torch_rpa.serving import SamplingParams


def load_tokenizer(directory: Path | None) -> Tokenizer:
    """Returns the tokenizer of a model directory, or the built-in one."""
    if directory is None:
        return ByteTokenizer()
    _require_directory(directory)
    return AutoTokenizer.from_pretrained(directory)


def load_model(
    directory: Path | None, attention: str, dtype: torch.dtype
) -> PreTrainedModel:
    """Returns a causal language model on the CPU, for inference.

    Args:
        directory: What ``save_pretrained`` wrote, or None for the built-in model.
        attention: Name of a registered attention implementation.
        dtype: Of the weights.
    """
    if directory is None:
        directory = byte_llama.WEIGHTS
    _require_directory(directory)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation=attention
    )
    return model.eval()


def sampling_params(
    model: PreTrainedModel, *, usual_new_tokens: int, **changes: Any
) -> SamplingParams:
    """Returns what the model's generation config asks for.

    Args:
        model: A causal language model.
        usual_new_tokens: Most new tokens where the config does not say a number. Its
            ``max_length`` counts the prompt, and is a limit of the model.
        changes: Attributes that are to differ.

    Raises:
        NotImplementedError: The config asks for what is not supported.
    """
    config: Any = copy.deepcopy(model.generation_config)
    config.max_new_tokens = config.max_new_tokens or usual_new_tokens
    params = {"eos_token_ids": eos_token_ids(model), **changes}
    return SamplingParams.from_generation_config(config, **params)


def eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Returns the tokens that end a text, by the model's generation config."""
    return token_ids(model.generation_config.eos_token_id)


def token_ids(ids: Iterable[int] | int | None) -> tuple[int, ...]:
    """Returns token ids that may be one, several or none."""
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _require_directory(directory: Path) -> None:
    # transformers would look for any other name on the network.
    if not (directory / "config.json").is_file():
        raise ValueError(
            "model must be a directory with a config.json, as save_pretrained writes "
            f"it, got {directory}"
        )

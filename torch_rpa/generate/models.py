"""The model and its tokenizer: from a directory, or the small built-in one."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from torch_rpa.generate import byte_llama
from torch_rpa.generate.tokenizer import ByteTokenizer, Tokenizer


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


def eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Returns the tokens that end a text, by the model's generation config."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def _require_directory(directory: Path) -> None:
    # transformers would look for any other name on the network.
    if not directory.is_dir():
        raise ValueError(f"model must be a directory, got {directory}")

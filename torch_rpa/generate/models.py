"""The model and its tokenizer: from a directory, or a small one built on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
)

from torch_rpa.generate.tokenizer import ByteTokenizer, Tokenizer

SEED = 0


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
        model = _built_in_model(attention).eval()
        return model.to(dtype)  # pyright: ignore[reportArgumentType]
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


def _built_in_model(attention: str) -> PreTrainedModel:
    """A small byte-level Llama with random weights, the same every time."""
    config = LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        # Wider than usual, so that random weights do not just repeat one token.
        initializer_range=0.1,
        bos_token_id=ByteTokenizer.bos_token_id,
        eos_token_id=ByteTokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model

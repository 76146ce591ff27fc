"""A small Mistral, whose layers all have a sliding window."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, MistralConfig

from tests.support.tiny_llama import VOCABULARY

WINDOW = 10


def build_mistral(attention: str):
    """A tiny Mistral with random weights, the same for each attention."""
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        sliding_window=WINDOW,
        initializer_range=0.2,
        eos_token_id=257,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.generation_config = GenerationConfig(eos_token_id=257)
    return model.eval()

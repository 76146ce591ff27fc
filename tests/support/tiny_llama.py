"""A small Llama for tests; nothing is ever downloaded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

import torch_rpa.transformers  # noqa: F401  (registers the attention "rpa")

VOCABULARY = 258


def build_llama(attention: str, *, head_dim: int = 32, num_kv_heads: int = 2):
    """A tiny Llama with random weights, the same for the same arguments."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=257,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.generation_config = GenerationConfig(eos_token_id=257)
    return model.eval()

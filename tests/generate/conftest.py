"""Small models for the tests of generation; nothing is ever downloaded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

# Property tests share two cores with compilations: time says nothing about them.
hypothesis.settings.register_profile(
    "untimed",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("untimed")

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


@pytest.fixture
def llama():
    """Builds a tiny Llama: ``llama("rpa")``, ``llama("eager", head_dim=128)``."""
    return build_llama


@pytest.fixture
def prompts() -> list[list[int]]:
    """Four prompts whose lengths straddle pages of 8: 1, 8, 9 and 21 tokens."""
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randint(0, VOCABULARY - 2, (length,), generator=generator).tolist()
        for length in (1, 8, 9, 21)
    ]

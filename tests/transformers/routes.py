"""A tiny model, padded prompts, and the ways to generate from them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from torch_rpa.transformers import generate, paged_generation

NEW_TOKENS = 12
# transformers 5.24 renamed this argument.
CACHE = "cache" if hasattr(CausalLMOutputWithPast(), "cache") else "past_key_values"
PAD, EOS = 0, 63


def build(attention: str):
    """A tiny Llama with random weights, the same every time."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.generation_config = GenerationConfig(pad_token_id=PAD)
    return model.eval()


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for :func:`build`: a character from "0" on for each token."""
    letters = {chr(ord("0") + i): i for i in range(64)}
    characters = Tokenizer(BPE(vocab=letters, merges=[]))
    characters.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="0", padding_side="left"
    )


def padded(side: str = "left") -> dict[str, torch.Tensor]:
    """Four prompts of 1, 8, 9 and 21 tokens."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.full((4, 21), PAD)
    mask = torch.zeros(4, 21, dtype=torch.long)
    for row, length in enumerate((1, 8, 9, 21)):
        columns = slice(21 - length, 21) if side == "left" else slice(length)
        ids[row, columns] = torch.randint(1, 60, (length,), generator=generator)
        mask[row, columns] = 1
    return {"input_ids": ids, "attention_mask": mask}


def eager_generate(model, inputs, **keywords):
    keywords = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **keywords}
    return model.generate(**inputs, **keywords)


def custom_generate(model, inputs, **keywords):
    keywords = {"page_size": 8, **keywords}
    return eager_generate(model, inputs, custom_generate=generate, **keywords)


def generate_in_block(model, inputs, **keywords):
    names = {"page_size", "num_pages", "max_tokens_per_step"}
    names |= {"cache_dtype", "k_scale", "v_scale"}
    given = {name: keywords.pop(name) for name in names & keywords.keys()}
    options: Any = {"page_size": 8, **given}
    with paged_generation(model, **options):
        return eager_generate(model, inputs, **keywords)

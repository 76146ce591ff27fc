"""The model families that the parity tests run, and the table of them in the docs.

``python -m tests.transformers.families`` writes the table; a test fails if it is stale.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

DOCUMENT = Path(__file__).parents[2] / "torch_rpa" / "transformers" / "README.md"
SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
ALTERNATING = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}
EXPERTS = {"num_experts_per_tok": 2}
GROUPED = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}


class Family(NamedTuple):
    """A family: its name in transformers, what is special, and a small config."""

    name: str
    title: str
    special: str
    config: dict[str, Any] = {}  # noqa: RUF012
    needs: tuple[int, int] = (4, 57)  # oldest release of transformers


class Refused(NamedTuple):
    """A family that is refused, where the tests see it, and why."""

    name: str
    title: str
    reason: str
    message: str  # of the error
    config: dict[str, Any] = {}  # noqa: RUF012


PROVEN = (
    Family("apertus", "Apertus", "QK-norm"),
    Family("arcee", "Arcee", ""),
    Family("cohere", "Cohere Command R", "parallel blocks"),
    Family("cohere2", "Cohere Command R7B", "window, no positions", ALTERNATING),
    Family(
        "dots1",
        "dots.llm1",
        "QK-norm, mixture of experts",
        {**EXPERTS, **GROUPED, "n_shared_experts": 1},
        (5, 0),  # before, their experts mix dtypes
    ),
    Family("ernie4_5", "Ernie 4.5", ""),
    Family(
        "ernie4_5_moe",
        "Ernie 4.5 MoE",
        "mixture of experts",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
        (5, 0),
    ),
    Family("exaone4", "Exaone 4", "QK-norm, window", ALTERNATING),
    Family("gemma", "Gemma", "head_dim 256", {"head_dim": 256}),
    Family(
        "gemma2",
        "Gemma 2",
        "soft cap, window, own scaling, head_dim 256",
        {**ALTERNATING, "head_dim": 256, "query_pre_attn_scalar": 200},
    ),
    Family(
        "gemma3_text",
        "Gemma 3 (text)",
        "window, QK-norm, own scaling, head_dim 256",
        {**ALTERNATING, "head_dim": 256, "query_pre_attn_scalar": 200},
    ),
    Family("glm", "GLM 4", "half rotary"),
    Family("glm4", "GLM 4 0414", "half rotary"),
    Family(
        "glm4_moe",
        "GLM 4.5",
        "half rotary, mixture of experts",
        {**EXPERTS, **GROUPED, "n_shared_experts": 1},
        (5, 0),  # before, their experts mix dtypes
    ),
    Family(
        "gpt_oss",
        "GPT-OSS",
        "sinks, window, mixture of experts, head_dim 64",
        {**ALTERNATING, **EXPERTS, "head_dim": 64, "num_local_experts": 4},
    ),
    Family("granite", "Granite 3", "own scaling", {"attention_multiplier": 0.3}),
    Family(
        "granitemoe",
        "Granite 3 MoE",
        "own scaling, mixture of experts",
        {
            **EXPERTS,
            "num_local_experts": 4,
            "attention_multiplier": 0.3,
            "hidden_size": 128,
        },
        (5, 0),
    ),
    Family("helium", "Helium", "", {"hidden_size": 128}),
    Family("hunyuan_v1_dense", "Hunyuan", "QK-norm"),
    Family(
        "llama",
        "Llama 3",
        "scaled rotary",
        {
            "rope_theta": 10000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    Family(
        "minimax_m2",
        "MiniMax M2",
        "QK-norm, mixture of experts",
        {**EXPERTS, "num_local_experts": 4},
        (5, 24),
    ),
    Family("mistral", "Mistral", "window in every layer", {"sliding_window": 6}),
    Family(
        "mixtral",
        "Mixtral",
        "mixture of experts",
        {**EXPERTS, "num_local_experts": 4},
    ),
    Family("olmo", "OLMo", ""),
    Family("olmo2", "OLMo 2", "QK-norm"),
    Family("olmo3", "OLMo 3", "QK-norm, window", ALTERNATING),
    Family(
        "olmoe",
        "OLMoE",
        "QK-norm, mixture of experts",
        {**EXPERTS, "num_experts": 4, "hidden_size": 128},
        (5, 0),
    ),
    Family("phi", "Phi 2", "half rotary, multi-head"),
    Family(
        "phi3",
        "Phi-3",
        "head_dim 96, window",
        {"hidden_size": 384, "head_dim": 96, "sliding_window": 6},
    ),
    Family(
        "phimoe",
        "Phi-3.5-MoE",
        "mixture of experts",
        {**EXPERTS, "num_local_experts": 4, "hidden_size": 128},
        (5, 0),
    ),
    Family("qwen2", "Qwen2, Qwen2.5", "biases"),
    Family(
        "qwen2_moe",
        "Qwen2-MoE",
        "mixture of experts",
        {
            **EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
        (5, 0),
    ),
    Family("qwen3", "Qwen3", "QK-norm"),
    Family(
        "qwen3_moe",
        "Qwen3-MoE",
        "QK-norm, mixture of experts",
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 32},
    ),
    Family("seed_oss", "Seed-OSS", ""),
    Family("smollm3", "SmolLM3", "layers without positions"),
    Family("starcoder2", "StarCoder2", "window", {"sliding_window": 6}),
)
REFUSED = (
    Refused(
        "bloom",
        "BLOOM, MPT and others with code of their own",
        "they do not read the attention registry",
        "keeps its own attention",
    ),
    Refused(
        "deepseek_v3",
        "DeepSeek V2, V3 (MLA)",
        "its latent cache needs a kernel of its own",
        "must have one head_dim",
        {
            "head_dim": 16,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "num_key_value_heads": 4,
        },
    ),
    Refused(
        "diffllama",
        "DiffLlama",
        "each layer attends twice, with other values",
        "attends a second time|keeps its own attention",  # the latter in 4.57
        {"hidden_size": 128},
    ),
    Refused(
        "gpt2",
        "GPT-2, GPT-NeoX, OPT, other older ones",
        "their modules do not say how many key heads there are",
        "attention module for each layer",
    ),
    Refused(
        "lfm2",
        "LFM2 and other hybrids",
        "layers without attention have a state that is not paged",
        "attention module for each layer|got 'conv'",
        {"layer_types": ["conv", "full_attention"]},
    ),
    Refused(
        "llama4_text",
        "Llama 4",
        "chunked attention, whose chunk size never reaches the attention function",
        "got 'chunked_attention'",
        {
            "num_local_experts": 2,
            "intermediate_size_mlp": 96,
            "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
    Refused(
        "nemotron",
        "Nemotron",
        "the context does not reach the attention function",
        "rpa must be given|keeps its own attention",  # the latter in 4.57
    ),
    Refused(
        "stablelm",
        "StableLM",
        "the context does not reach the attention function",
        "rpa must be given|keeps its own attention",  # the latter in 4.57
        {"hidden_size": 128},
    ),
)
BEGIN = "<!-- families: python -m tests.transformers.families -->"
END = "<!-- end of families -->"


def table() -> str:
    """Returns the table of families, in Markdown."""
    rows = ["| family | `model_type` | transformers | has | state |", "|" + "---|" * 5]
    for name, title, special, _, needs in PROVEN:
        oldest = ".".join(map(str, needs))
        rows.append(f"| {title} | `{name}` | {oldest}+ | {special} | proven |")
    for name, title, reason, *_ in REFUSED:
        rows.append(f"| {title} | `{name}` | | | refused: {reason} |")
    return "\n".join(rows)


def with_table(document: str) -> str:
    """Returns the document with its table replaced by the present one."""
    pattern = re.compile(f"({re.escape(BEGIN)}\n).*({re.escape(END)})", re.DOTALL)
    new, count = pattern.subn(lambda m: f"{m[1]}\n{table()}\n\n{m[2]}", document)
    if count != 1:
        raise ValueError(f"the document must have the table's marks once, got {count}")
    return new


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), "utf-8")

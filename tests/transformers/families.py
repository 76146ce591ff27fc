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
WIDE = {"hidden_size": 128}  # heads of 32, where they are a share of it
PER_LAYER_INPUTS = {
    **ALTERNATING,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
}
GROUPED = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
MANY_EXPERTS = {
    **EXPERTS,
    **GROUPED,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "num_dense_layers": 1,
}
# Rounding to bfloat16 chooses among all of them alike.
ALL_EXPERTS = {**MANY_EXPERTS, "num_experts_per_tok": 4}
OPT = {**WIDE, "word_embed_proj_dim": 128, "ffn_dim": 96}


class Family(NamedTuple):
    """A family: its name in transformers, what is special, and a small config."""

    name: str
    title: str
    special: str
    config: dict[str, Any] = {}  # noqa: RUF012
    needs: tuple[int, int] = (4, 57)  # oldest release of transformers
    is_extended: bool = False  # tested outside of CI alone


def _extended(
    name: str, title: str, special: str, config: dict[str, Any] | None = None
) -> Family:
    """One of the long tail, which is proven with transformers 5.24."""
    return Family(name, title, special, config or {}, (5, 24), is_extended=True)


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
    _extended(
        "afmoe",
        "AFMoE (Arcee Trinity)",
        "window, mixture of experts",
        {**ALTERNATING, **MANY_EXPERTS},
    ),
    _extended("apertus1p5_text", "Apertus 1.5 (text)", "QK-norm"),
    _extended("aria_text", "Aria (text)", "mixture of experts", MANY_EXPERTS),
    _extended("beam", "Beam", "window", ALTERNATING),
    _extended("biogpt", "BioGPT", "multi-head", WIDE),
    _extended("bitnet", "BitNet", "", WIDE),
    _extended(
        "cohere2_moe",
        "Cohere 2 MoE",
        "window, mixture of experts",
        {**ALTERNATING, **MANY_EXPERTS},
    ),
    _extended("cwm", "Code World Model", "window", ALTERNATING),
    _extended("exaone", "Exaone 3", ""),
    _extended(
        "exaone_moe",
        "Exaone MoE",
        "window, mixture of experts",
        {**ALTERNATING, **MANY_EXPERTS},
    ),
    _extended("flex_olmo", "FlexOlmo", "mixture of experts", ALL_EXPERTS),
    _extended("flint", "Flint", "window, sinks", ALTERNATING),
    _extended(
        "gemma3n_text",
        "Gemma 3n (text)",
        "window, inputs of each layer",
        {
            **PER_LAYER_INPUTS,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0, 0.0],
            "intermediate_size": [96, 96],
        },
    ),
    _extended(
        "gemma4_text",
        "Gemma 4 (text)",
        "window, other heads in full layers",
        {
            **PER_LAYER_INPUTS,
            "global_head_dim": 512,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
        },
    ),
    _extended("gpt2", "GPT-2", "multi-head, learned positions", WIDE),
    _extended("gpt_bigcode", "GPT-BigCode (StarCoder)", "one key head", WIDE),
    _extended("granite_swa", "Granite with windows", "window, sinks", ALTERNATING),
    _extended(
        "granitemoe_swa",
        "Granite MoE with windows",
        "window, sinks, mixture of experts",
        {**ALTERNATING, **EXPERTS, "num_local_experts": 4},
    ),
    _extended("granitemoeshared", "Granite MoE, shared experts", "mixture of experts"),
    _extended("hunyuan_v1_moe", "Hunyuan MoE", "QK-norm, mixture of experts"),
    _extended("hy_v3", "Hunyuan 3", "mixture of experts", MANY_EXPERTS),
    _extended("hyperclovax", "HyperCLOVA X", "own scaling"),
    _extended("internlm3", "InternLM 3", ""),
    _extended("iquestcoder", "IQuest-Coder", ""),
    _extended("jais2", "Jais 2", ""),
    _extended("jetmoe", "JetMoE", "mixture of attention heads and experts"),
    _extended(
        "kolibri1",
        "Kolibri 1",
        "window, mixture of experts",
        {**ALTERNATING, **MANY_EXPERTS},
    ),
    _extended(
        "laguna",
        "Laguna",
        "window, other numbers of heads in each layer, mixture of experts",
        {**ALTERNATING, **ALL_EXPERTS, "num_attention_heads_per_layer": [4, 2]},
    ),
    _extended(
        "mellum",
        "Mellum",
        "window, mixture of experts",
        {**ALTERNATING, **MANY_EXPERTS},
    ),
    _extended("ministral", "Ministral", "window", ALTERNATING),
    _extended("ministral3", "Ministral 3", ""),
    _extended("nanochat", "nanochat", "QK-norm"),
    _extended("opt", "OPT", "multi-head, learned positions", OPT),
    _extended("persimmon", "Persimmon, Fuyu (text)", "half rotary, multi-head", WIDE),
    _extended("sarvam_moe", "Sarvam MoE", "mixture of experts", MANY_EXPERTS),
    _extended("solar_open", "Solar Open", "mixture of experts", MANY_EXPERTS),
    _extended("vaultgemma", "VaultGemma", "soft cap, window, own scaling", ALTERNATING),
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
        "gpt_neox",
        "GPT-NeoX, GPT-J, other older ones",
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
    for name, title, special, _, needs, _ in sorted(PROVEN, key=_by_title):
        oldest = ".".join(map(str, needs))
        rows.append(f"| {title} | `{name}` | {oldest}+ | {special} | proven |")
    for name, title, reason, *_ in REFUSED:
        rows.append(f"| {title} | `{name}` | | | refused: {reason} |")
    return "\n".join(rows)


def _by_title(family: Family) -> str:
    return family.title.lower()


def with_table(document: str) -> str:
    """Returns the document with its table replaced by the present one."""
    pattern = re.compile(f"({re.escape(BEGIN)}\n).*({re.escape(END)})", re.DOTALL)
    new, count = pattern.subn(lambda m: f"{m[1]}\n{table()}\n\n{m[2]}", document)
    if count != 1:
        raise ValueError(f"the document must have the table's marks once, got {count}")
    return new


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), "utf-8")

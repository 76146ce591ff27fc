"""What vLLM may ask for and does not get here, each with another way."""

from __future__ import annotations

from typing import Any

from jax_kernels.contract import cache

# What the sampler of vLLM's XLA path leaves out without a word, and its neutral value.
_IGNORED_BY_THE_SAMPLER = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "logit_bias": None,
    "bad_words": None,
    "allowed_token_ids": None,
    "prompt_logprobs": None,
}
_SERVE_ELSEWHERE = "use torch_rpa.serving, or vLLM on JAX"


def check_layer(config: Any) -> None:
    """Raises if the attention of a layer is not one that the operator computes.

    Args:
        config: vLLM's ``AttentionSelectorConfig``.

    Raises:
        NotImplementedError: It names the feature and another way.
    """
    for name, title in {
        "use_mla": "latent attention (MLA)",
        "use_sparse": "sparse attention",
        "use_mm_prefix": "images that see each other (prefix attention)",
    }.items():
        if getattr(config, name):
            raise _not_supported(title, _SERVE_ELSEWHERE)
    if config.attn_type != "decoder":
        raise _not_supported(f"attention of type {config.attn_type}", _SERVE_ELSEWHERE)
    cache.check_head_dim(config.head_size)


def check_config(vllm_config: Any) -> None:
    """Raises if the engine is set up for what was never made to work here.

    Raises:
        NotImplementedError: It names the option and another way.
    """
    parallel = vllm_config.parallel_config
    cache_config = vllm_config.cache_config
    for is_on, title, other in (
        (parallel.pipeline_parallel_size > 1, "pipeline_parallel_size", "1"),
        (parallel.data_parallel_size > 1, "data_parallel_size", "several servers"),
        (parallel.decode_context_parallel_size > 1, "context parallelism", "1"),
        (parallel.prefill_context_parallel_size > 1, "context parallelism", "1"),
        (
            parallel.tensor_parallel_size > 1 and not uses_spmd(),
            "tensor_parallel_size > 1 with a process for each chip",
            "SPMD, with VLLM_XLA_USE_SPMD=1",
        ),
        (vllm_config.speculative_config, "speculative decoding", "none"),
        (vllm_config.kv_transfer_config, "kv_transfer_config", "none"),
        (vllm_config.lora_config, "LoRA", "a merged checkpoint"),
        (
            cache_config.calculate_kv_scales,
            "calculate_kv_scales",
            "a checkpoint with scales, such as torch_rpa.measure_kv_scales gives",
        ),
    ):
        if is_on:
            raise _not_supported(title, f"use {other}")


def check_request(params: Any) -> None:
    """Raises if a request asks for what the sampler would leave out.

    Args:
        params: vLLM's ``SamplingParams``, or parameters of a pooling request.

    Raises:
        ValueError: It names all of them.
    """
    asked = [
        name
        for name, neutral in _IGNORED_BY_THE_SAMPLER.items()
        if getattr(params, name, neutral) not in (neutral, [], {})
    ]
    if asked:
        raise ValueError(
            f"{', '.join(asked)} must be left out, got "
            f"{[getattr(params, name) for name in asked]}: the sampler of vLLM on "
            "PyTorch/XLA would ignore it. If it is from the model's generation config, "
            "start vLLM with --generation-config vllm"
        )


def uses_spmd() -> bool:
    """Whether vLLM runs one process for all chips."""
    import vllm.envs  # pyright: ignore[reportMissingImports]

    return vllm.envs.VLLM_XLA_USE_SPMD


def _not_supported(what: str, other: str) -> NotImplementedError:
    return NotImplementedError(
        f"torch_rpa.vllm does not support {what}, other way: {other}"
    )

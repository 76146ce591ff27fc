"""Serves tiny models with vLLM on JAX CPU devices, and prints what came out, as JSON.

``python -m tests.jax_kernels.integrations.engine_cases CASE`` runs one case in a
process of its own. On a CPU tpu-inference needs some help, none of it in attention; see
``help_on_cpu``.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# tpu-inference has an environment of its own.

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the scheduler can be seen
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["SKIP_JAX_PRECOMPILE"] = "1"
# Without these two the runner changes arrays on the host that JAX on a CPU still reads.
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tests.support.child_results import print_result
from tests.support.engine_trials import (
    FAMILIES,
    PAGE_SIZE,
    expected_tokens,
    generate,
    make_model,
    make_prompts,
    runner_of,
    tokens_beside_cancelled,
    tokens_with_few_pages,
)

BACKEND = "torch_rpa"
ENGINE_OPTIONS = {"async_scheduling": False}  # see above


def help_on_cpu() -> None:
    """Replaces what tpu-inference asks of TPUs alone."""
    from tpu_inference import utils

    def plain_mesh(shape: Any, names: Any, *, devices: Any = None) -> Any:
        devices = np.array((devices or jax.devices())[: int(np.prod(shape))])
        return jax.sharding.Mesh(devices.reshape(shape), names)

    utils.make_optimized_mesh = plain_mesh  # sorts devices by their coordinates
    utils.get_device_hbm_limit = lambda: 1 << 30
    jit = jax.jit

    def jit_without_options(*args: Any, **options: Any) -> Any:
        options.pop("compiler_options", None)  # of the TPU's compiler
        return jit(*args, **options)

    jax.jit = jit_without_options
    resize = torch.UntypedStorage.resize_

    def resize_if_possible(self: Any, size: int) -> Any:
        try:
            return resize(self, size)
        except RuntimeError:  # a float32 weight is a view of an array of NumPy
            return self

    torch.UntypedStorage.resize_ = resize_if_possible
    from tpu_inference.kernels.sparse_core import dense_gather_reduce
    from tpu_inference.layers.common import fused_moe_gmm

    # Kernels for TPUs; the second one has an alternative of its own.
    fused_moe_gmm.gmm_wrapper = multiply_by_expert
    dense_gather_reduce.is_compatible = lambda *args: False


def multiply_by_expert(
    rows: jax.Array,
    weights: jax.Array,
    scale: None,
    bias: jax.Array | None,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    fuse_act: str | None = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """Multiplies each row of ``[M, K]`` by one of the matrices ``[E, K, N]``.

    The first rows belong to the first matrix, and so on. After the first product of
    experts, halves of the result are gates and values, as GPT-OSS has them.
    """
    assert scale is None
    ends = jnp.cumsum(group_sizes)
    expert = jnp.searchsorted(ends, jnp.arange(rows.shape[0]), side="right")
    expert = jnp.clip(expert - group_offset[0], 0, weights.shape[0] - 1)
    out = jnp.einsum("mk,mkn->mn", rows, weights[expert])
    if bias is not None:
        out += bias[expert, 0]
    if fuse_act is not None:
        assert fuse_act == "swigluoai"
        gate, values = jnp.split(out, 2, axis=-1)
        gate, values = jnp.minimum(gate, 7.0), jnp.clip(values, -7.0, 7.0)
        out = gate * jax.nn.sigmoid(1.702 * gate) * (values + 1)
    return out.astype(preferred_element_type or rows.dtype)


def make_engine(directory: str, **options: Any) -> Any:
    help_on_cpu()
    import vllm

    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "attention_backend": BACKEND,
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,  # long prompts come in chunks
        "block_size": PAGE_SIZE,
        "num_gpu_blocks_override": 128,
        "enable_prefix_caching": True,
        "gpu_memory_utilization": 0.5,
    }
    return vllm.LLM(directory, **defaults | ENGINE_OPTIONS | options)


def serve_family(family: str, implementation: str, **options: Any) -> dict[str, Any]:
    """Chunks, then prefixes, then requests that are cancelled."""
    os.environ["MODEL_IMPL_TYPE"] = implementation
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(family, directory)
        prompts = make_prompts()
        engine = make_engine(directory, **options)
        first, _ = generate(engine, prompts)
        again, num_cached = generate(engine, prompts)
        cancelled = tokens_beside_cancelled(engine, prompts)
        runner = runner_of(engine)
        cache = runner.kv_caches[0]
        return {
            "expected": expected_tokens(model, prompts),
            "first": first,
            "again": again,
            "cached": num_cached,
            "cancelled": cancelled,
            "cache": list(cache.shape),
            "devices": len(cache.sharding.device_set),
            "backend": type(runner.attention_backend).__name__,
            "model": type(runner.model).__module__.split(".")[0],
        }


def preempt() -> dict[str, Any]:
    """Serves with so few pages that requests are taken out and computed again."""
    os.environ["MODEL_IMPL_TYPE"] = "vllm"
    with tempfile.TemporaryDirectory() as directory:
        model = make_model("llama", directory)
        prompts = make_prompts()
        engine = make_engine(
            directory,
            num_gpu_blocks_override=13,
            max_model_len=128,
            enable_prefix_caching=False,
        )
        tokens, preempted = tokens_with_few_pages(engine, prompts)
        return {
            "expected": expected_tokens(model, prompts),
            "first": tokens,
            "preempted": preempted,
        }


CASES: dict[str, Any] = {
    family: lambda family=family: serve_family(family, "vllm") for family in FAMILIES
} | {
    "flax": lambda: serve_family("llama", "flax_nnx"),
    "two_devices": lambda: serve_family("llama", "vllm", tensor_parallel_size=2),
    "preempt": preempt,
}

if __name__ == "__main__":
    print_result(CASES[sys.argv[1]]())

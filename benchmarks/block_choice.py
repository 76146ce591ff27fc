"""Which block sizes the kernel takes by default for a static shape, and why."""

from __future__ import annotations

import jax.numpy as jnp

from benchmarks import cases
from jax_kernels import chips
from jax_kernels.ragged_paged_attention import block_sizes
from jax_kernels.ragged_paged_attention.config import AttentionSpec
from jax_kernels.ragged_paged_attention.layout import CacheLayout
from jax_kernels.ragged_paged_attention.validation import Problem


def problem_of(shape: cases.StaticShape) -> tuple[Problem, AttentionSpec]:
    """What ``ragged_paged_attention`` makes of the arguments of a shape."""
    model = shape.model
    q_dtype = jnp.dtype(shape.q_dtype)
    problem = Problem(
        num_tokens=shape.num_tokens,
        num_sequences=shape.num_sequences,
        pages_per_sequence=shape.pages_per_sequence,
        num_q_heads=model.num_q_heads,
        q_dtype=q_dtype,
        out_dtype=q_dtype,
        cache=CacheLayout(
            shape.num_pages,
            shape.page_size,
            model.num_kv_heads,
            model.head_dim,
            shape.cache_dtype,
        ),
    )
    spec = AttentionSpec(**shape.options, has_sinks=model.with_sinks)
    return problem, spec.for_context(problem.max_kv_len)


def explain(shape: cases.StaticShape, chip: str) -> block_sizes.Choice:
    """The sizes that a call takes without ``block_sizes``, and where they come from."""
    return block_sizes.explain(*problem_of(shape), chips.find_chip(chip))


def as_text(choice: block_sizes.Choice) -> str:
    blocks = choice.blocks
    return (
        f"decode_block_kv {blocks.decode_block_kv} ({choice.decode_source}); "
        f"block_q {blocks.block_q}, block_kv {blocks.block_kv} "
        f"({choice.prefill_source})"
    )

"""A plugin of pytest: tpu-inference's own tests of its kernels test this project's.

``python -m pytest -p tests.jax_kernels.integrations.upstream_kernels FILE`` with a file
``tests/kernels/ragged_paged_attention_kernel_v3*_test.py`` of its wheel. Each call of a
kernel becomes one of ``sharded.attend`` with the cache in the other layout. With
RPA_INTERPRET=1 the kernel computes, else its reference.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# tpu-inference has an environment of its own.

from __future__ import annotations

import os
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax._src import test_util
from tpu_inference.kernels.ragged_paged_attention.v3 import kernel, kernel_hd64

from jax_kernels import ragged_paged_attention as rpa
from jax_kernels.integrations.tpu_inference import cache_shape, sharded
from tests.jax_kernels.integrations.test_sharded import AXES, PLAIN, one_device

# What tunes their kernels, and says nothing about the result.
TUNING = {
    "m_block_sizes",
    "vmem_limit_bytes",
    "num_kv_pages_per_block",
    "num_queries_per_block",
}


def to_engine_shape(cache: jax.Array, num_kv_heads: int, width: int) -> jax.Array:
    """Their cache, with keys and values of a token in turn, in the shape of ours."""
    num_pages, page_size = cache.shape[:2]
    rows = cache.reshape(num_pages, page_size, num_kv_heads, 2, width)
    packed = rpa.pack_kv_cache(rows.transpose(0, 3, 2, 1, 4))
    shape = cache_shape.engine_shape(
        num_pages, page_size, num_kv_heads, width, cache.dtype.name
    )
    return packed.reshape(shape)


def to_their_shape(
    cache: jax.Array, theirs: tuple[int, ...], num_kv_heads: int, width: int
) -> jax.Array:
    """The other way."""
    local = cache.reshape(cache_shape.kernel_shape(cache.shape))
    pages = rpa.unpack_kv_cache(local, num_kv_heads, width)
    return pages.transpose(0, 3, 2, 1, 4).reshape(theirs)


def row_width(head_dim: int) -> int:
    """Lanes of a key in their cache."""
    return head_dim if head_dim == 64 else -(-head_dim // 128) * 128


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    sinks: jax.Array | None = None,
    *,
    use_causal_mask: bool = True,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """A call of their kernel."""
    num_q_heads, num_kv_heads = q.shape[1], k.shape[1]
    # Theirs writes heads that only fill 4 bytes, and the test compares them.
    lanes = cache.shape[2] * cache.shape[3] * cache.shape[4]
    padding = lanes // (2 * row_width(q.shape[-1])) - num_kv_heads
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, padding * (x.shape[1] // num_kv_heads)), (0, 0)))
        for x in (q, k, v)
    )
    if sinks is not None:
        sinks = jnp.pad(sinks, (0, q.shape[1] - num_q_heads))
    sizes = k.shape[1], row_width(q.shape[-1])
    options = {name: x for name, x in options.items() if name not in TUNING}
    options = {**PLAIN, "sm_scale": 1.0, "causal": use_causal_mask, **options}

    @jax.jit
    def call(cache: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, new = sharded.attend(
            q,
            k,
            v,
            to_engine_shape(cache, *sizes),
            sharded.Step(kv_lens, page_indices, cu_q_lens, distribution),
            sinks,
            mesh=one_device(),
            axes=AXES,
            interpret=os.environ.get("RPA_INTERPRET") == "1",
            **options,
        )
        return out[:, :num_q_heads], to_their_shape(new, cache.shape, *sizes)

    return call(cache)


test_util.is_device_tpu_at_least = lambda version: True
kernel.ragged_paged_attention = attend
kernel_hd64.ragged_paged_attention_hd64 = attend

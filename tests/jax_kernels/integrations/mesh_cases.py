"""Calls on four CPU devices, beside calls on one; run by test_sharded.py in a child.

How many devices the CPU has belongs to a process: start it with JAX_NUM_CPU_DEVICES=4.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_kernels import ragged_paged_attention as rpa
from jax_kernels.integrations.tpu_inference import cache_shape, sharded
from tests.jax_kernels.integrations.test_sharded import PLAIN, SEQUENCES, assert_same
from tests.support.ragged_batches import make_ragged_batch


def make_batch(num_kv_heads, seed=0):
    return make_ragged_batch(
        SEQUENCES, num_q_heads=8, num_kv_heads=num_kv_heads, with_sinks=True, seed=seed
    )


def expected_of(batch):
    out, cache = rpa.ragged_paged_attention_reference(
        *batch.jax_arguments, sm_scale=0.1
    )
    return out, per_head(cache, batch)


def per_head(cache, batch):
    """Keys and values [N, 2, Hkv, page_size, D]."""
    _, num_kv_heads, head_dim = batch.jax_arguments[1].shape
    return rpa.unpack_kv_cache(cache, num_kv_heads, head_dim)


def in_engine_shape(batch, num_shards, factor=1):
    """The cache of a batch with heads repeated, as the engine has it on a mesh."""
    pages = jnp.repeat(per_head(batch.jax_arguments[3], batch), factor, axis=2)
    parts = jnp.split(pages, num_shards, axis=2)
    shards = [rpa.pack_kv_cache(part) for part in parts]
    num_pages, _, num_kv_heads, page_size, head_dim = parts[0].shape
    shape = cache_shape.engine_shape(
        num_pages, page_size, num_kv_heads, head_dim, shards[0].dtype.name
    )
    return jnp.concatenate([shard.reshape(shape) for shard in shards], axis=2)


def from_engine_shape(cache, batch, num_shards, factor=1):
    """Keys and values of all heads, of the repeated ones the first."""
    num_kv_heads = batch.jax_arguments[1].shape[1] * factor // num_shards
    head_dim = batch.jax_arguments[0].shape[-1]
    parts = [
        rpa.unpack_kv_cache(
            shard.reshape(cache_shape.kernel_shape(shard.shape)), num_kv_heads, head_dim
        )
        for shard in jnp.split(cache, num_shards, axis=2)
    ]
    return jnp.concatenate(parts, axis=2)[:, :, ::factor]


def attend(arrays, cache, mesh, axes):
    q, k, v, _, *metadata, sinks = arrays
    step = sharded.Step(*metadata)
    return sharded.attend(q, k, v, cache, step, sinks, mesh=mesh, axes=axes, **PLAIN)


def mesh_of(**sizes):
    count = int(np.prod(list(sizes.values())))
    devices = np.array(jax.devices()[:count]).reshape(list(sizes.values()))
    return Mesh(devices, tuple(sizes))


def check_heads(num_kv_heads, mesh, axes, factor=1):
    batch, num_shards = make_batch(num_kv_heads), 4
    cache = in_engine_shape(batch, num_shards, factor)
    out, cache = attend(batch.jax_arguments, cache, mesh, axes)
    assert len(out.sharding.device_set) == num_shards
    cache = from_engine_shape(cache, batch, num_shards, factor)
    assert_same((out, cache), expected_of(batch))


def check_data():
    """Two parts of the data with pages of their own, and two shards of the heads."""
    batches = [make_batch(4, seed) for seed in range(2)]
    arrays = [
        jnp.concatenate(part)
        for part in zip(*(b.jax_arguments[:8] for b in batches), strict=True)
    ]
    cache = jnp.concatenate([in_engine_shape(batch, 2) for batch in batches])
    out, cache = attend(
        (*arrays, batches[0].jax_arguments[8]),
        cache,
        mesh_of(data=2, model=2),
        sharded.Axes("data", "model"),
    )
    for batch, one_out, one_cache in zip(
        batches, jnp.split(out, 2), jnp.split(cache, 2), strict=True
    ):
        arguments: tuple = (*batch.jax_arguments[:8], batches[0].jax_arguments[8])
        expected, expected_cache = rpa.ragged_paged_attention_reference(
            *arguments, sm_scale=0.1
        )
        one_cache = from_engine_shape(one_cache, batch, 2)
        assert_same((one_out, one_cache), (expected, per_head(expected_cache, batch)))


if __name__ == "__main__":
    heads = sharded.Axes("data", "model")
    check_heads(4, mesh_of(data=1, model=4), heads)
    print("heads")
    check_heads(2, mesh_of(data=1, model=4), heads, factor=2)
    print("repeated heads")
    check_data()
    print("data")
    several = sharded.Axes(("data", "attn_dp"), ("model", "expert", "dcp"))
    check_heads(4, mesh_of(data=1, attn_dp=1, model=2, expert=2, dcp=1), several)
    print("experts")

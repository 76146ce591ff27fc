"""The backend's call, compiled for four TPUs with libtpu."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_kernels import chips
from jax_kernels.integrations.tpu_inference import cache_shape, sharded
from jax_kernels.ragged_paged_attention import jax_versions
from tests.jax_kernels.integrations.test_sharded import AXES, PLAIN
from tests.support.optimised_hlo import OptimisedHlo

NUM_DEVICES = 4
NUM_Q_HEADS, NUM_TOKENS, NUM_SEQUENCES, PAGES_PER_SEQUENCE = 32, 256, 64, 16
TOKENS, CACHE, SEQUENCES = P("data", "model", None), P("data", None, "model"), P("data")


def compile_for(chip, num_kv_heads, head_dim, cache_dtype):
    """Returns the compiled program, and bytes of the cache of a device."""
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=chips.COMPILED[chip].topology
    )
    devices = np.array(topology.devices[:NUM_DEVICES]).reshape(1, NUM_DEVICES)
    mesh = Mesh(devices, ("data", "model"))
    shape = list(
        cache_shape.engine_shape(
            512, 128, num_kv_heads // NUM_DEVICES, head_dim, cache_dtype
        )
    )
    num_bytes = math.prod(shape) * jnp.dtype(cache_dtype).itemsize
    shape[2] *= NUM_DEVICES

    def array(shape, dtype, spec) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)

    is_quantised = jnp.dtype(cache_dtype).itemsize == 1
    new_dtype = cache_dtype if is_quantised else "bfloat16"
    new = array((NUM_TOKENS, num_kv_heads, head_dim), new_dtype, TOKENS)
    table = NUM_SEQUENCES * PAGES_PER_SEQUENCE
    sizes = NUM_SEQUENCES, table, NUM_SEQUENCES + 1, 3
    scales = {"k_scale": 0.5, "v_scale": 0.5} if is_quantised else {}
    run = functools.partial(sharded.attend, mesh=mesh, axes=AXES, **PLAIN | scales)
    with jax_versions.byte_code_for_libtpu():
        compiled = (
            jax.jit(lambda *arrays: run(*arrays, None), donate_argnums=3)
            .lower(
                array((NUM_TOKENS, NUM_Q_HEADS, head_dim), "bfloat16", TOKENS),
                new,
                new,
                array(shape, cache_dtype, CACHE),
                sharded.Step(*(array((n,), "int32", SEQUENCES) for n in sizes)),
            )
            .compile()
        )
    return compiled, num_bytes


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "cache_dtype"),
    [
        (8, 128, "bfloat16"),
        (8, 64, "bfloat16"),
        (8, 128, "float8_e4m3fn"),
        (4, 64, "bfloat16"),  # axis 1 is not the page
    ],
)
def test_the_cache_stays_where_it_is(chip, num_kv_heads, head_dim, cache_dtype):
    compiled, num_bytes = compile_for(chip, num_kv_heads, head_dim, cache_dtype)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    hlo = OptimisedHlo(text)
    assert len(hlo.kernel_calls) == 1
    assert hlo.collectives == {}
    assert memory.alias_size_in_bytes >= num_bytes
    # A copy of the cache would be beside arguments and results.
    assert memory.temp_size_in_bytes < num_bytes / 4

"""The kernel whose dump is recorded beside this file.

``python -m tests.benchmarks.recorded.guarded_loop.kernel`` compiles it anew. Loop
counts are 8-bit integers in scalar memory, and a reduction over a vector decides
whether an iteration stores its exponential.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.benchmarks.recorded import recording

NAME = "guarded_loop"
LOOPS = 130
THRESHOLD = 4.0


def _kernel(counts, x, out):
    def outer(i, _):
        def inner(j, _):
            block = x[pl.ds(pl.multiple_of(j * 8, 8), 8), :]
            out[...] = block

            @pl.when(jnp.any(block > THRESHOLD))
            def _():
                out[...] = jnp.exp(block)

        jax.lax.fori_loop(0, counts[i].astype(jnp.int32), inner, None)

    jax.lax.fori_loop(0, LOOPS, outer, None)


def _call(counts, x):
    return pl.pallas_call(
        _kernel,
        name=NAME,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM)],
            out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        ),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
    )(counts, x)


if __name__ == "__main__":
    recording.main(
        "tests.benchmarks.recorded.guarded_loop.kernel",
        {
            NAME: (
                _call,
                (
                    jax.ShapeDtypeStruct((LOOPS,), jnp.int8),
                    jax.ShapeDtypeStruct((1024, 128), jnp.float32),
                ),
            )
        },
    )

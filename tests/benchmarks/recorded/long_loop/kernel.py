"""The kernel whose log is recorded beside this file: one loop of 70,000 bundles.

``python -m tests.benchmarks.recorded.long_loop.kernel`` compiles it anew, in half a
minute. Its listing is long, and is not kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.benchmarks.recorded import recording

NAME = "long_loop"
STEPS = 35_000  # of two bundles


def _kernel(counts, out):
    def iteration(_, x):
        for step in range(STEPS):
            x = (x ^ (step * 7919)) + (step | 1)
        return x

    out[0] = jax.lax.fori_loop(0, counts[1], iteration, counts[0])


def _call(counts):
    return pl.pallas_call(
        _kernel,
        name=NAME,
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)],
        out_specs=pl.BlockSpec(memory_space=pltpu.SMEM),
        out_shape=jax.ShapeDtypeStruct((1,), jnp.int32),
    )(counts)


if __name__ == "__main__":
    recording.main(
        "tests.benchmarks.recorded.long_loop.kernel",
        {NAME: (_call, (jax.ShapeDtypeStruct((4,), jnp.int32),))},
        parts=(),
    )

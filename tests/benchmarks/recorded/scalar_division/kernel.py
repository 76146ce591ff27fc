"""The kernels whose dumps are recorded beside this file, compiled by libtpu 0.0.44.

``python -m tests.benchmarks.recorded.scalar_division.kernel`` compiles them anew, in an
environment with that release, JAX 0.11.0 and Python 3.12. That libtpu divides by
instructions that later ones do not use for the same source. Both kernels copy blocks;
how many depends on a quotient and on remainders of scalars.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.benchmarks.recorded import recording

BLOCKS, ROWS, LANES = 64, 32, 128
COUNTS = {
    "floor_division": lambda lens: lens[0] // 32,
    "remainders": lambda lens: lens[0] % 12 + lens[1] % 900,
}


def _kernel(count, lens, source, target, scratch, flag):
    def copy(this, there):
        started = pltpu.make_async_copy(this, there, flag)
        started.start()
        started.wait()

    def fetch(i, _):
        copy(source.at[i % BLOCKS], scratch)

    jax.lax.fori_loop(0, count(lens), fetch, None)
    copy(scratch, target)


def _call(name, lens, source):
    return pl.pallas_call(
        functools.partial(_kernel, COUNTS[name]),
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[
                pltpu.VMEM((ROWS, LANES), jnp.float32),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=pltpu.HBM(shape=(ROWS, LANES), dtype=jnp.float32),
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
    )(lens, source)


if __name__ == "__main__":
    recording.main(
        "tests.benchmarks.recorded.scalar_division.kernel",
        {
            name: (
                functools.partial(_call, name),
                (
                    jax.ShapeDtypeStruct((8,), jnp.int32),
                    jax.ShapeDtypeStruct((BLOCKS, ROWS, LANES), jnp.float32),
                ),
            )
            for name in COUNTS
        },
    )

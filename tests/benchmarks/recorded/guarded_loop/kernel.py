"""The kernel whose dump is recorded beside this file.

``python -m tests.benchmarks.recorded.guarded_loop.kernel`` compiles it anew. Loop counts
are 8-bit integers in scalar memory, and a reduction over a vector decides whether an
iteration stores its exponential.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from benchmarks import compiler

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


def _compile() -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="tpu7x:2x2x1")
    where = SingleDeviceSharding(topology.devices[0])
    call = pl.pallas_call(
        _kernel,
        name=NAME,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM)],
            out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        ),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
    )
    jax.jit(call).lower(
        jax.ShapeDtypeStruct((LOOPS,), jnp.int8, sharding=where),
        jax.ShapeDtypeStruct((1024, 128), jnp.float32, sharding=where),
    ).compile()


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.recorded.guarded_loop.kernel"],
            env=compiler.dumping_environment(directory) | {"RECORDING": "1"},
            check=True,
        )
        here = Path(__file__).parent
        for old in here.glob("*.txt"):
            old.unlink()
        for path in Path(directory).glob(f"*-{NAME}.1-*.txt"):
            label = path.name.split(f"-{NAME}.1-")[1]
            if label.split("-", 1)[1].removesuffix(".txt") in READ:
                (here / f"1-{NAME}.1-{label}").write_bytes(path.read_bytes())


# What the instrument reads.
READ = (
    "post-ra",
    "packed-bundles-post-ra",
    "final_bundles",
    "pre-delay_hlo-static-per-bundle-utilization",
)

if __name__ == "__main__":
    if "RECORDING" in os.environ:
        _compile()
    else:
        main()

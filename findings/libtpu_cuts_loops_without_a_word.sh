#!/usr/bin/env bash
# libtpu: a loop that is longer than instruction memory is compiled without a warning.
#
# Versions: libtpu 0.0.52, jax 0.10.2, jaxlib 0.10.2.
#
# Seen: a Pallas kernel with one loop over some scalar instructions, compiled for TPU7x.
# What the compiler prints by default, and what its log says if it is turned on:
#
#   bundles in the loop   printed   pieces of the loop
#   40000                 nothing   1, of 40720 bundles
#   70000                 nothing   4, of 21672, 21672, 21672 and 5056 bundles
#
# Instruction memory has 65,536 bundles. So each iteration of the longer loop fetches
# its 70,000 bundles from HBM again, in four transfers.
#
# Expected: a warning by default. Where the code is made of unrolled Python loops, its
# length is hard to foresee, and no dump file of the compiler tells it.
#
# Why it matters here: a larger block size or another dtype may push the prefill loop
# over this edge (float32 with 32/8 heads does), and a prediction that does not know of
# it is too fast. The instrument turns the log on, counts the fetches and reports such a
# loop (benchmarks/tpu_timing/overlays.py, code_size.py).
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-deps jax==0.10.2 jaxlib==0.10.2 \
    libtpu==0.0.52 ml_dtypes==0.6.0 numpy==2.4.6 opt_einsum==3.4.0 scipy==1.17.1

cd "$work"
cat > compile.py <<'EOF'
import sys

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

STEPS = int(sys.argv[1]) // 2  # of two bundles


def kernel(counts, out):
    def iteration(_, x):
        for step in range(STEPS):
            x = (x ^ (step * 7919)) + (step | 1)
        return x

    out[0] = jax.lax.fori_loop(0, counts[1], iteration, counts[0])


SMEM = pl.BlockSpec(memory_space=pltpu.SMEM)
call = pl.pallas_call(
    kernel,
    in_specs=[SMEM],
    out_specs=SMEM,
    out_shape=jax.ShapeDtypeStruct((1,), jnp.int32),
)
device = topologies.get_topology_desc(
    platform="tpu", topology_name="tpu7x:2x2x1"
).devices[0]
counts = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=SingleDeviceSharding(device))
jax.jit(call).lower(counts).compile()
EOF

export JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_SKIP_MDS_QUERY=1 \
    TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v6e-4
for bundles in 40000 70000; do
    printed=$("$work/venv/bin/python" compile.py "$bundles" 2>&1)
    log=$(TPU_MIN_LOG_LEVEL=0 TPU_STDERR_LOG_LEVEL=0 TPU_VMODULE=overlay=1 \
        "$work/venv/bin/python" compile.py "$bundles" 2>&1)
    # The loop's pieces are the long ones.
    pieces=$(grep -oE 'Overlay #[1-9][0-9]*, kind:1, bundles:[0-9]{4,}' <<< "$log" |
        grep -oE '[0-9]+$' | paste -sd' ')
    echo "loop of $bundles bundles: printed '$printed', pieces: $pieces"
    test -z "$(grep -iE 'overlay|warn' <<< "$printed")"
    case $bundles in
        40000) test "$pieces" = 40720 ;;
        70000) test "$pieces" = "21672 21672 21672 5056" ;;
    esac
done

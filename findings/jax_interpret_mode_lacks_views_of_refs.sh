#!/usr/bin/env bash
# Pallas TPU interpret mode fails on views of refs, which the TPU compiler takes.
#
# Versions: jax 0.10.2, jaxlib 0.10.2, libtpu 0.0.52.
#
# Seen: a kernel that reads pairs of bfloat16 as 32-bit words through
# `ref.bitcast(jnp.uint32)`.
#
#   compiled for v6e
#   interpret=True: 0x3f803f80, which is right
#   interpret=InterpretParams(): AttributeError: 'BitcastTransform' object has no
#   attribute 'indices'
#
# A `reshape` of the view fails in the same way; `pltpu.bitcast` of a value works.
#
# Expected: that interpret mode runs each kernel that compiles, or says which view of a
# ref it has no support for. The mode exists to find races and missing waits, and needs
# a second version of a kernel that is written with such views.
#
# Why it matters here: packed caches are read and written as 32-bit words. All such
# views are in one room, tile_io.py of the kernel, each with a twin for interpret mode
# that views the value instead; test_tile_io.py holds the two together.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-deps jax==0.10.2 jaxlib==0.10.2 \
    libtpu==0.0.52 ml_dtypes==0.6.0 numpy==2.4.6 opt_einsum==3.4.0 scipy==1.17.1

cd "$work"
export JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_SKIP_MDS_QUERY=1 \
    TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v6e-4
"$work/venv/bin/python" - <<'EOF'
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding


def kernel(x_ref, words_ref):
    words_ref[...] = x_ref.bitcast(jnp.uint32)[...]


def words_of(interpret):
    shape = jax.ShapeDtypeStruct((4, 128), jnp.uint32)
    return jax.jit(pl.pallas_call(kernel, out_shape=shape, interpret=interpret))


topology = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2")
where = SingleDeviceSharding(topology.devices[0])
shape = jax.ShapeDtypeStruct((8, 128), jnp.bfloat16, sharding=where)
words_of(interpret=False).lower(shape).compile()
print("compiled for v6e")

ones = jnp.ones((8, 128), jnp.bfloat16)
words = words_of(interpret=True)(ones)
print(f"interpret=True: {int(words[0, 0]):#x}")
assert (words == 0x3F803F80).all()

try:
    words_of(interpret=pltpu.InterpretParams())(ones).block_until_ready()
except jax.errors.JaxRuntimeError as error:
    message = str(error).strip().splitlines()[-1]
else:
    raise AssertionError("interpret mode ran the kernel")
print("interpret=InterpretParams():", message)
assert "'BitcastTransform' object has no attribute 'indices'" in message
EOF

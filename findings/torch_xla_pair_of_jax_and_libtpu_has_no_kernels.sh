#!/usr/bin/env bash
# The jax and the libtpu that torch_xla 2.9.0 asks for do not fit: no Pallas kernel runs.
#
# Versions: torch_xla 2.9.0 (its extras "pallas" and "tpu" only), jax 0.7.1,
# jaxlib 0.7.1, libtpu 0.0.21.
#
# Seen: a kernel that adds one, lowered for a TPU and given to libtpu for v6e.
#
#   torch_xla 2.9.0 asks for: jax==0.7.1, jaxlib==0.7.1, libtpu==0.0.21
#   libtpu was built on 2025-08-15; jax writes version 8 for those from 2025-08-14 on
#   version 8: Unsupported version: expected <= 7 but got 8
#   version 7: compiled
#
# Expected: that the two extras of one release, `pip install torch_xla[tpu,pallas]`, fit
# each other. jax decides by the date on which libtpu was built which version of the byte
# code it reads, and this libtpu is a day too young for that rule.
#
# Why it matters here: with these two releases, a kernel of this project is refused like
# every other one, unless version 7 is asked for. `jax_versions.byte_code_for_libtpu`
# does that where PyTorch's bridge and the tests lower the kernel.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-deps torch_xla==2.9.0 libtpu==0.0.21 \
    jax==0.7.1 jaxlib==0.7.1 \
    ml_dtypes==0.6.0 numpy==2.4.6 opt_einsum==3.4.0 scipy==1.17.1

cd "$work"
export JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_SKIP_MDS_QUERY=1 \
    TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v6e-4
"$work/venv/bin/python" - <<'EOF'
import datetime
import importlib.metadata
import inspect
import re

import jax
import jax.numpy as jnp
from jax._src import tpu_custom_call
from jax.experimental import pallas as pl
from jax.experimental import topologies

wanted = sorted(
    requirement.partition(";")[0].strip()
    for requirement in importlib.metadata.requires("torch_xla")
    if re.match("jax|libtpu", requirement)
)
print("torch_xla 2.9.0 asks for:", ", ".join(wanted))
assert wanted == ["jax==0.7.1", "jaxlib==0.7.1", "libtpu==0.0.21"]

device = topologies.get_topology_desc(
    platform="tpu", topology_name="v6e:2x2"
).devices[0]
(seconds,) = re.findall(r"\((\d+)\)", device.client.platform_version)
built = datetime.datetime.fromtimestamp(int(seconds), datetime.timezone.utc).date()
rule = inspect.getsource(tpu_custom_call.get_ir_version)
newest = max(
    datetime.date(*map(int, found))
    for found in re.findall(r"older_than\((\d+), (\d+), (\d+)\)", rule)
)
print(f"libtpu was built on {built}; jax writes version 8 for those from {newest} on")
assert built >= newest


def add_one(x_ref, out_ref):
    out_ref[...] = x_ref[...] + 1


def compile_kernel():
    sharding = jax.sharding.SingleDeviceSharding(device)
    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=sharding)
    function = pl.pallas_call(
        add_one, out_shape=jax.ShapeDtypeStruct(shape.shape, shape.dtype)
    )
    jax.jit(function, out_shardings=sharding).lower(shape).compile()


try:
    compile_kernel()
except jax.errors.JaxRuntimeError as error:
    (reason,) = re.findall("Unsupported version.*", str(error))
    print("version 8:", reason)
    assert "expected <= 7 but got 8" in reason
else:
    raise AssertionError("version 8 was read")

jax.clear_caches()
tpu_custom_call.get_ir_version = lambda context: 7
compile_kernel()
print("version 7: compiled")
EOF

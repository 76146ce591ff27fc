#!/usr/bin/env bash
# The libtpu that torch_xla 2.9.0 asks for takes no kernel of a present jax, no TPU7x.
#
# Versions: torch_xla 2.9.0 (its extra "tpu" only), libtpu 0.0.21, jax 0.10.2.
#
# Seen: what torch_xla asks for, and a kernel of jax 0.10.2 given to that libtpu.
#
#   torch_xla 2.9.0 [tpu]: libtpu==0.0.21
#   v6e: ... Unsupported version: expected <= 7 but got 11
#   tpu7x: INVALID_ARGUMENT: Invalid TPU external name: TPU7x
#
# Expected: a lower bound for libtpu rather than one version. torch_xla 2.9.0 is the
# last release, so `pip install torch_xla[tpu]` stays at this libtpu for good. TPU7x is
# shut out, and kernels written by a present jax fail when they are compiled, long after
# pip has found no conflict.
#
# Why it matters here: this package installs libtpu 0.0.42 or newer beside torch_xla
# (its extra "tpu"; README, "On a TPU VM") and must not be installed together with
# `torch_xla[tpu]`.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-deps torch_xla==2.9.0 libtpu==0.0.21 \
    jax==0.10.2 jaxlib==0.10.2 \
    ml_dtypes==0.6.0 numpy==2.4.6 opt_einsum==3.4.0 scipy==1.17.1

cd "$work"
export JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_SKIP_MDS_QUERY=1 \
    TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v6e-4
"$work/venv/bin/python" - <<'EOF'
import importlib.metadata

import jax
import jax.numpy as jnp
from jax._src import compiler
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jaxlib import _jax

wanted = [
    requirement.partition(";")[0].strip()
    for requirement in importlib.metadata.requires("torch_xla")
    if requirement.startswith("libtpu")
]
print("torch_xla 2.9.0 [tpu]:", *wanted)
assert wanted == ["libtpu==0.0.21"]


def add_one(x_ref, out_ref):
    out_ref[...] = x_ref[...] + 1


shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
traced = jax.jit(pl.pallas_call(add_one, out_shape=shape)).trace(shape)
lowered = traced.lower(lowering_platforms=("tpu",))


def refusal(topology_name):
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=topology_name
        )
        device = topology.devices[0]
        # As torch_xla does: the lowered program goes to libtpu as it is.
        device.client.compile(
            lowered.compiler_ir(),
            _jax.DeviceList((device,)),
            compiler.get_compile_options(1, 1),
        )
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    raise AssertionError(f"{topology_name} compiled")


message = refusal("v6e:2x2")
start = message.index("Unsupported version")
print("v6e: ...", message[start:].splitlines()[0])
assert "expected <= 7 but got 11" in message

message = refusal("tpu7x:2x2x1")
print("tpu7x:", message.splitlines()[0])
assert "Invalid TPU external name: TPU7x" in message
EOF

#!/usr/bin/env bash
# jax 0.12: a Pallas TPU kernel with `pl.run_scoped` is not lowered without a TPU.
#
# Versions: jax 0.12.0.1, jaxlib 0.12.0.1, Python 3.12. jax 0.10.2 lowers both kernels.
#
# Seen: two kernels, lowered for "tpu" on a machine with a CPU only.
#
#   whole buffers: lowered
#   run_scoped: ValueError: Unsupported TPU device kind: cpu. If you are not running on
#   a TPU device, you need to wrap your code in a `jax.sharding.use_abstract_mesh` ...
#   run_scoped, under the mesh of an abstract TPU7x: lowered
#
# Expected: that the platform named in `lower(lowering_platforms=("tpu",))` is enough,
# as it was before, or that both kernels ask for the chip. Only what is inside the
# kernel decides whether the default device is asked what it is.
#
# Why it matters here: PyTorch's bridge lowers the kernel in a process whose JAX has a
# CPU only, since torch_xla holds the TPU; and all compile tests run without a TPU.
# `jax_versions.device_named` traces `run_scoped` under such a mesh, inside the kernel, so
# that callers name the chip and need no mesh.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-deps jax==0.12.0.1 jaxlib==0.12.0.1 \
    ml_dtypes==0.6.0 numpy==2.5.5 opt_einsum==3.4.0 scipy==1.18.1

cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'EOF'
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

SHAPE = jax.ShapeDtypeStruct((8, 128), jnp.float32)


def whole_buffers(x_ref, out_ref):
    out_ref[...] = x_ref[...] + 1


def scoped(x_ref, out_ref):
    def body(buffer):
        buffer[...] = x_ref[...] + 1
        out_ref[...] = buffer[...]

    pl.run_scoped(body, pltpu.VMEM(x_ref.shape, x_ref.dtype))


def lower(kernel):
    traced = jax.jit(pl.pallas_call(kernel, out_shape=SHAPE)).trace(SHAPE)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text


lower(whole_buffers)
print("whole buffers: lowered")

try:
    lower(scoped)
except ValueError as error:
    print(f"run_scoped: ValueError: {error}")
    assert "Unsupported TPU device kind: cpu" in str(error)
else:
    raise AssertionError("run_scoped was lowered")

chip = AbstractDevice(device_kind="TPU7x", num_cores=1, platform="tpu")
with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=chip)):
    lower(scoped)
print("run_scoped, under the mesh of an abstract TPU7x: lowered")
EOF

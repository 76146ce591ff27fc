#!/usr/bin/env bash
# Which e4m3 a TPU multiplies differs by chip; the other one costs, or is refused.
#
# Versions: libtpu 0.0.52, jax 0.10.2, jaxlib 0.10.2.
#
# Seen: scores of 512 bfloat16 queries with 512 keys of 128 lanes, compiled for three
# chips. A vector multiplication per 8x128 tile of scores is what 256 of them are.
#
#   chip   keys in float8   vector multiplications  instruction
#   v5e    e4m3fn           256 (by 16.0)           f8e4m3b11
#   v5e    e4m3b11fnuz      0                       f8e4m3b11
#   v5e    e5m2             0                       bf8
#   v6e    e4m3fn           256 (by 16.0)           f8e4m3b11
#   v6e    e4m3b11fnuz      0                       f8e4m3b11
#   v6e    e5m2             0                       bf8
#   tpu7x  e4m3fn           0                       f8e4m3
#   tpu7x  e4m3b11fnuz      Unsupported type for matmul
#   tpu7x  e5m2             0                       f8e5m2
#
# So the e4m3 of v5e and v6e has an exponent bias of 11. There the compiler multiplies
# float8_e4m3fn by the instruction for the other format, whose values are 16 times too
# small, and makes up for it by multiplying every product of the matrices by 16.
#
# Expected: that the usual float8, e4m3fn, costs no more than e5m2 on each chip, as the
# factor could go into the smaller operand; and that one of the two formats compiles for
# all chips.
#
# Why it matters here: a float8_e4m3fn cache would slow prefill on v5e and v6e. The
# kernel reads the stored bits as float8_e4m3b11fnuz on those chips and puts the factor
# into the queries and the output (`reads_e4m3_shifted` of the kernel's configuration;
# test_kernel_numerics.py). Cycles by chip and dtype are in jax_kernels/README.md.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-deps jax==0.10.2 jaxlib==0.10.2 \
    libtpu==0.0.52 ml_dtypes==0.6.0 numpy==2.4.6 opt_einsum==3.4.0 scipy==1.17.1

cd "$work"
export JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_SKIP_MDS_QUERY=1 \
    TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v6e-4
LIBTPU_INIT_ARGS="--xla_jf_dump_to=$work/dump --xla_jf_dump_llo_text=true" \
    "$work/venv/bin/python" - <<'EOF'
import pathlib
import re

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
DTYPES = ("float8_e4m3fn", "float8_e4m3b11fnuz", "float8_e5m2")
TILES = 512 * 512 // (8 * 128)


def kernel(queries_ref, keys_ref, scores_ref):
    scores_ref[...] = jax.lax.dot_general(
        queries_ref[...],
        keys_ref[...],
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def schedule(chip, dtype):
    """Returns the compiled instructions of the kernel, one per line."""
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[chip]
    )
    where = SingleDeviceSharding(topology.devices[0])
    name = f"scores_{chip}_{dtype}"
    call = pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((512, 512), jnp.float32), name=name
    )
    arguments = [
        jax.ShapeDtypeStruct((512, 128), jnp.dtype(of), sharding=where)
        for of in ("bfloat16", dtype)
    ]
    jax.jit(call).lower(*arguments).compile()
    (dump,) = (
        path
        for path in pathlib.Path("dump").glob(f"*{name}*-packed-bundles-post-ra.txt")
        if "schedule-analysis" not in path.name
    )
    return dump.read_text()


seen = {}
for chip in TOPOLOGIES:
    for dtype in DTYPES:
        try:
            text = schedule(chip, dtype)
        except jax.errors.JaxRuntimeError as error:
            found = re.search("Unsupported type for matmul", str(error))
            assert found, error
            seen[chip, dtype] = found.group()
        else:
            multiplications = re.findall(r"vmul\.f32 ([^,]*),", text)
            assert set(multiplications) <= {"16.0"}
            formats = set(re.findall(r"vmatpush\w*\.(\w*8\w*)", text))
            seen[chip, dtype] = (len(multiplications), *formats)
        print(chip, dtype, seen[chip, dtype])

for chip in ("v5e", "v6e"):
    assert seen[chip, "float8_e4m3fn"] == (TILES, "f8e4m3b11")
    assert seen[chip, "float8_e4m3b11fnuz"] == (0, "f8e4m3b11")
    assert seen[chip, "float8_e5m2"] == (0, "bf8")
assert seen["tpu7x", "float8_e4m3fn"] == (0, "f8e4m3")
assert seen["tpu7x", "float8_e4m3b11fnuz"] == "Unsupported type for matmul"
assert seen["tpu7x", "float8_e5m2"] == (0, "f8e5m2")
EOF

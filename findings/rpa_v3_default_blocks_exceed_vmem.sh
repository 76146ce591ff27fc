#!/usr/bin/env bash
# tpu-inference: RPA v3 chooses blocks that do not fit into VMEM if there are many key
# heads.
#
# Versions: tpu-inference 0.31.0, jax 0.11.0, jaxlib 0.11.0, libtpu 0.0.52, Python 3.12.
#
# Seen: two calls for TPU7x, whose cores have 64 MiB of VMEM, with 32 query heads and 32
# key heads of 256 in bfloat16, for 8 sequences that decode in a cache of 32 pages of
# 128 tokens each.
#
#   blocks of its own choice: RESOURCE_EXHAUSTED: Allocation (size=138412032) would
#   exceed memory (size=67108864)
#   small blocks for the sequences that do not decode, of which there are none: compiled
#
# Expected: that the default fits for any number of heads, as it does for the decodes.
# The block of keys and values of the other sequences has 2048 tokens whatever a token
# needs, and both kernels are compiled in every call.
#
# Why it matters here: comparisons with RPA v3 "as it comes" are not possible for such
# heads. `benchmarks/peers` gives small blocks to the phase that has no sequences; for
# prefill of such heads the caller has to name blocks.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-deps jax==0.11.0 jaxlib==0.11.0 \
    libtpu==0.0.52 ml_dtypes==0.6.0 numpy==2.5.5 opt_einsum==3.4.0 scipy==1.18.1 \
    tpu_inference==0.31.0

cd "$work"
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost
export TPU_ACCELERATOR_TYPE=v6e-4
"$work/venv/bin/python" - <<'EOF'
import importlib
import importlib.util
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# The package's own __init__ needs vLLM; the kernel does not.
package = types.ModuleType("tpu_inference")
package.__path__ = list(
    importlib.util.find_spec("tpu_inference").submodule_search_locations
)
sys.modules["tpu_inference"] = package
kernel = importlib.import_module(
    "tpu_inference.kernels.ragged_paged_attention.v3.kernel"
)

DEVICE = topologies.get_topology_desc(
    platform="tpu", topology_name="tpu7x:2x2x1"
).devices[0]
SEQUENCES, PAGES, PAGE_SIZE, HEADS, HEAD_DIM = 8, 32, 128, 32, 256


def array(dtype, *sizes):
    return jax.ShapeDtypeStruct(
        sizes, jnp.dtype(dtype), sharding=SingleDeviceSharding(DEVICE)
    )


def compile_call(**options):
    def call(*arguments):
        return kernel.ragged_paged_attention(*arguments, **options)

    new = array("bfloat16", SEQUENCES, HEADS, HEAD_DIM)
    cache = kernel.get_kv_cache_shape(
        SEQUENCES * PAGES, PAGE_SIZE, HEADS, HEAD_DIM, jnp.bfloat16
    )
    with (
        mock.patch.object(jax, "devices", lambda *_: [DEVICE]),
        jax.default_device(DEVICE),
    ):
        jax.jit(call, donate_argnums=(0, 1, 2, 3)).lower(
            new,
            new,
            new,
            array("bfloat16", *cache),
            array("int32", SEQUENCES),
            array("int32", SEQUENCES * PAGES),
            array("int32", SEQUENCES + 1),
            array("int32", 3),
        ).compile()


try:
    compile_call()
except jax.errors.JaxRuntimeError as error:
    print(f"blocks of its own choice: {str(error)[:90]}")
    assert "RESOURCE_EXHAUSTED" in str(error) and "67108864" in str(error)
else:
    raise AssertionError("the default blocks fit")

compile_call(m_block_sizes=(1, 128, 1, 128))
print("small blocks for the sequences that do not decode: compiled")
EOF

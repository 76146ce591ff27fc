#!/usr/bin/env bash
# jax 0.12: `jnp.pad` on the CPU makes zeros of subnormal bfloat16 numbers.
#
# Versions: jax 0.12.0.1, jaxlib 0.12.0.1, Python 3.12, x86-64. jax 0.10.2 keeps them.
#
# Seen: 32 numbers of bits 0x0003, padded by as many.
#
#   bfloat16 called: 0x0, under jit: 0x3
#   float16 called: 0x3, under jit: 0x3
#   float32 called: 0x3, under jit: 0x3
#
# Expected: that padding moves numbers, as it does for the other dtypes and for the same
# call under `jax.jit`.
#
# Why it matters here: `pack_kv_cache` pads heads to 128 lanes, and what it packs has to be
# the same bytes again. It moves them as integers.
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
import numpy as np


def pad(x):
    return jnp.pad(x, (0, 32))


def first_bits(array):
    return int(np.asarray(array).view(f"u{array.dtype.itemsize}")[0])


seen = {}
for name in ("bfloat16", "float16", "float32"):
    dtype = jnp.dtype(name)
    numbers = jnp.asarray(np.full(32, 3, f"u{dtype.itemsize}").view(dtype))
    seen[name] = first_bits(pad(numbers)), first_bits(jax.jit(pad)(numbers))
    called, jitted = map(hex, seen[name])
    print(f"{name} called: {called}, under jit: {jitted}")
assert seen == {"bfloat16": (0, 3), "float16": (3, 3), "float32": (3, 3)}
EOF

#!/usr/bin/env bash
# torch_xla 2.9.0: of a JAX function only its Pallas call is run, without its aliases.
#
# Versions: torch_xla 2.9.0, torch 2.9.1, jax 0.7.1, jaxlib 0.7.1 (those that the extra
# "pallas" of torch_xla 2.9.0 asks for).
#
# Seen: `make_kernel_from_pallas` on a function that adds 1 in a Pallas kernel, in place
# (`input_output_aliases={0: 0}`), and doubles the result outside it.
#
#                       in JAX's program   in torch_xla's graph
#   Pallas call         yes                yes
#   alias of its input  yes                no
#   the doubling        yes                no
#
# No error and no warning: on a TPU the result would be x + 1 instead of 2 * (x + 1).
# The script needs no TPU: it tells JAX to lower for one, and looks at the graph only.
#
# Expected: the whole function, or an error that says that only the kernel is taken.
# `trace_pallas` looks for the first custom call in the module and takes its payload;
# `_xla_tpu_custom_call` has no argument for aliases.
#
# Why it matters here: without the alias each step would copy the cache of every layer,
# and the reshapes around the kernel would be lost. torch_rpa hands the whole lowered
# program to torch_xla instead; tests/torch_rpa/test_tpu_graph.py shows the aliases.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile \
    torch==2.9.1 torch_xla==2.9.0 numpy==2.4.6 \
    jax==0.7.1 jaxlib==0.7.1

cd "$work"
JAX_PLATFORMS=cpu PJRT_DEVICE=CPU "$work/venv/bin/python" - <<'EOF'
from unittest import mock

import torch
import torch_xla

x = torch.ones(8, 128, device=torch_xla.device())
torch_xla.sync()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402
from torch_xla.experimental.custom_kernel import make_kernel_from_pallas  # noqa: E402


def add_one(x_ref, out_ref):
    out_ref[...] = x_ref[...] + 1


def add_one_and_double(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    y = pl.pallas_call(add_one, out_shape=shape, input_output_aliases={0: 0})(x)
    return 2 * y


jit = jax.jit


class JitForTpu:
    """jax.jit whose `lower` is for a TPU, as it is where the default device is one."""

    def __init__(self, function, **options):
        self._jitted = jit(function, **options)

    def lower(self, *arguments, **options):
        traced = self._jitted.trace(*arguments, **options)
        return traced.lower(lowering_platforms=("tpu",))


jax_text = (
    JitForTpu(add_one_and_double)
    .lower(jax.ShapeDtypeStruct((8, 128), jnp.float32))
    .as_text()
)
kernel = make_kernel_from_pallas(add_one_and_double, lambda x: [(x.shape, x.dtype)])
with mock.patch.object(jax, "jit", JitForTpu):
    result = kernel(x)
torch_xla_text = torch_xla._XLAC._get_xla_tensors_hlo([result])

in_jax = [
    word in jax_text
    for word in ("tpu_custom_call", "output_operand_alias", "stablehlo.multiply")
]
in_torch_xla = [
    word in torch_xla_text
    for word in ("tpu_custom_call", "output_to_operand_aliasing", "multiply(")
]
names = ("Pallas call", "alias of its input", "the doubling")
for name, first, second in zip(names, in_jax, in_torch_xla, strict=True):
    print(f"{name}: in JAX's program {first}, in torch_xla's graph {second}")
assert in_jax == [True, True, True]
assert in_torch_xla == [True, False, False]
EOF

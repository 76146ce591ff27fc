#!/usr/bin/env bash
# torch_xla 2.9.0: no custom operator that changes an argument, and a misleading reason.
#
# Versions: torch_xla 2.9.0, torch 2.9.1, on the XLA CPU device.
#
# Seen: an operator made with torch.library.custom_op and mutates_args=("y",).
#
#   CPU: y is [2.0, 2.0]
#   XLA: Found a custom (non-ATen) operator whose output has alias annotations:
#   finding::add_to(Tensor x, Tensor(a1!) y) -> (). We only support functionalizing
#   operators whose outputs do not have alias annotations ...
#
# Expected: that the documented way to write such an operator works on each device, as
# it does on CPU and under torch.compile. The message speaks of outputs with aliases and
# advises to return a clone; this operator has no output at all.
#
# Why it matters here: the attention operator updates the cache in place and must work
# on XLA. Its public form is composite: it calls a functional operator that returns a
# new cache, and then makes that the value of the old one (torch_rpa/ops.py).
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile \
    torch==2.9.1 torch_xla==2.9.0 numpy==2.4.6

cd "$work"
PJRT_DEVICE=CPU "$work/venv/bin/python" - <<'EOF'
import torch
import torch_xla


@torch.library.custom_op("finding::add_to", mutates_args=("y",))
def add_to(x: torch.Tensor, y: torch.Tensor) -> None:
    y.add_(x)


x, y = torch.ones(2), torch.ones(2)
add_to(x, y)
print("CPU: y is", y.tolist())
assert y.tolist() == [2.0, 2.0]

device = torch_xla.device()
try:
    add_to(x.to(device), torch.ones(2, device=device))
except RuntimeError as error:
    message = str(error)
else:
    raise AssertionError("the operator ran on XLA")
print("XLA:", message[:250])
assert "custom (non-ATen) operator whose output has alias annotations" in message
assert "finding::add_to(Tensor x, Tensor(a1!) y) -> ()" in message
EOF

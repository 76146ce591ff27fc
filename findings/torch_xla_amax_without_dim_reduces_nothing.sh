#!/usr/bin/env bash
# torch_xla 2.9.0: `amax()` and `amin()` without a dimension return their argument.
#
# Versions: torch_xla 2.9.0, torch 2.9.1, on the XLA CPU device.
#
# Seen: the shape of `torch.ones(3, 4).amax()`.
#
#   amax, amin:      CPU (), XLA (3, 4)
#   max, sum, mean:  CPU (), XLA ()
#
# Expected: a scalar. torch reduces over all dimensions where none are given.
#
# Why it matters here: torch_rpa measures the largest key of a model with `max()`, which
# is not affected (torch_rpa/transformers/largest_entries.py).
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

x = torch.ones(3, 4)
on_xla = x.to(torch_xla.device())
for name in ("amax", "amin", "max", "sum", "mean"):
    shapes = [tuple(getattr(t, name)().cpu().shape) for t in (x, on_xla)]
    print(f"{name}: CPU {shapes[0]}, XLA {shapes[1]}")
    assert shapes == [(), (3, 4) if name in ("amax", "amin") else ()]
EOF

#!/usr/bin/env bash
# torch_xla 2.9.0: `>>` of a negative integer divides, which rounds towards zero.
#
# Versions: torch_xla 2.9.0, torch 2.9.1, on the XLA CPU device.
#
# Seen: `x >> 1` for integers of 32 bits.
#
#   x    [-1, -2, -3, -5, -8, 7]
#   CPU  [-1, -1, -2, -3, -4, 3]
#   XLA  [0, -1, -1, -2, -4, 3]
#
# int8 and int64 differ in the same way. `<<` agrees.
#
# Expected: an arithmetic shift, which rounds down, as torch documents it for signed
# integers. Hashes and packed words get other bits on XLA without an error.
#
# Why it matters here: the sampler of torch_rpa.serving makes its random bits by shifts
# of int32 and must give the same tokens on each device. `_shift` in
# torch_rpa/serving/sampling.py clears the low bits first: division is exact then.
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

values = [-1, -2, -3, -5, -8, 7]
print("x   ", values)
for dtype in (torch.int8, torch.int32, torch.int64):
    x = torch.tensor(values, dtype=dtype)
    on_cpu = (x >> 1).tolist()
    on_xla = (x.to(torch_xla.device()) >> 1).tolist()
    print(f"CPU  {on_cpu} {dtype}")
    print(f"XLA  {on_xla} {dtype}")
    assert on_cpu == [value // 2 for value in values]
    assert on_xla == [int(value / 2) for value in values]
    left = (x.to(torch_xla.device()) << 1).tolist()
    assert left == (x << 1).tolist()
EOF

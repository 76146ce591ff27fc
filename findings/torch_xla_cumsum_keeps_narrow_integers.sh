#!/usr/bin/env bash
# torch_xla 2.9.0: `cumsum` of narrow integers and bools stays narrow, and overflows.
#
# Versions: torch_xla 2.9.0, torch 2.9.1, on the XLA CPU device.
#
# Seen: the last element of `torch.ones(300, dtype=...).cumsum(0)`.
#
#   bool:  CPU 300 (int64), XLA True (bool)
#   uint8: CPU 300 (int64), XLA 44 (uint8)
#   int8:  CPU 300 (int64), XLA 44 (int8)
#   int32: CPU 300 (int64), XLA 300 (int32)
#   torch.where(sums > 1, sums, int64 zeros).long(): Error while lowering ...
#   Binary op shift-left with different element types: s64[] and s32[].
#
# Expected: int64 sums, as torch promises for integers of any width, and as `sum`,
# `prod` and `cumprod` give on XLA too. A mask of bools is what cumsum is most often
# used with, to count tokens. With `dtype=` the results agree.
#
# Why it matters here: padded prompts become ragged ones by counting the tokens of a
# mask. torch_rpa converts it with `.long()` before `cumsum` (torch_rpa/transformers);
# code that prepares the operator's metadata on the device should do the same.
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

device = torch_xla.device()
seen = {}
for dtype in (torch.bool, torch.uint8, torch.int8, torch.int32):
    x = torch.ones(300, dtype=dtype)
    on_cpu, on_xla = x.cumsum(0), x.to(device).cumsum(0)
    seen[dtype] = on_xla[-1].item()
    print(
        f"{dtype}: CPU {on_cpu[-1].item()} ({on_cpu.dtype}), "
        f"XLA {seen[dtype]} ({on_xla.dtype})"
    )
    assert on_cpu.dtype == torch.int64 and on_xla.dtype == dtype
    widened = x.to(device).cumsum(0, dtype=torch.int64)
    assert widened[-1].item() == on_cpu[-1].item() == 300
assert seen == {torch.bool: True, torch.uint8: 44, torch.int8: 44, torch.int32: 300}

sums = torch.ones(300, dtype=torch.int32, device=device).cumsum(0)
zeros = torch.zeros(300, dtype=torch.int64, device=device)
try:
    torch.where(sums > 1, sums, zeros).long().cpu()
except RuntimeError as error:
    message = str(error)
else:
    raise AssertionError("where of these sums was lowered")
print("torch.where(sums > 1, sums, int64 zeros).long():", message.split("Frames")[0])
assert "shift-left with different element types" in message
EOF

#!/usr/bin/env bash
# torch: None for a `bool` argument of an operator means False, whatever its default is.
#
# Versions: torch 2.9.1, on the CPU.
#
# Seen: an operator `flip(Tensor x, bool negate=True, int times=1) -> Tensor`.
#
#   flip(x) gets negate=True
#   flip(x, negate=None) gets negate=False
#   flip(x, times=None): Expected a value of type 'int' for argument 'times' but instead
#   found type 'NoneType'.
#
# Expected: the error that `int` and `float` arguments give, since the schema says
# `bool` and not `bool?`. None is how Python callers say "the default", and here it is
# the opposite of it.
#
# Why it matters here: `torch.ops.rpa.ragged_paged_attention` has a `bool` argument
# whose default is True, `update_kv_cache`. With None it comes as False: nothing is
# written to the cache, and no error is possible below torch's own dispatcher. Pass
# True or False, or call `torch_rpa.ragged_paged_attention`, a Python function.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.9.1 numpy==2.4.6

cd "$work"
"$work/venv/bin/python" - <<'EOF'
import torch

library = torch.library.Library("finding", "DEF")
library.define("flip(Tensor x, bool negate=True, int times=1) -> Tensor")
got = []


def flip(x, negate=True, times=1):
    got.append(negate)
    return -x if negate else x


library.impl("flip", flip, "CPU")
x = torch.ones(2)

torch.ops.finding.flip(x)
print(f"flip(x) gets negate={got[-1]}")
assert got[-1] is True

torch.ops.finding.flip(x, negate=None)
print(f"flip(x, negate=None) gets negate={got[-1]}")
assert got[-1] is False

try:
    torch.ops.finding.flip(x, times=None)
except RuntimeError as error:
    message = str(error)
else:
    raise AssertionError("None was taken for an int")
print("flip(x, times=None):", message.splitlines()[0])
assert "Expected a value of type 'int' for argument 'times'" in message
EOF

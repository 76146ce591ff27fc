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
# Why it matters here: `update_kv_cache` of `torch.ops.rpa.ragged_paged_attention` is
# True by default. Declared as `bool`, None for it leaves the cache unwritten, and the
# operator cannot notice, since False is what arrives. Pass True or False; only a schema
# that says `bool?` lets an operator refuse None.
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

#!/usr/bin/env bash
# torch 2.13: a compiled function on disk ignores that two arguments are one tensor.
#
# Versions: torch 2.13.0, Python 3.11. Needs a C++ compiler, as torch.compile does.
#
# Seen: a function adds 1 to its first argument, doubles its second one in place, and
# returns the sum. Processes that share a cache directory compile it.
#
#   two tensors of ones: compiled 4.0, eager 4.0
#   a tensor of ones and a view of it: compiled 4.0, eager 8.0
#   a tensor of ones and a view of it, without the cache: compiled 8.0, eager 8.0
#
# The second process finds what the first one compiled for two tensors, and runs it: the
# result is wrong, without a word. Whether arguments share memory is not in the key of
# the cache, though torch.compile looks at it when it compiles.
#
# Expected: 8.0 in all processes that pass a view.
#
# Why it matters here: layers that share a cache pass one tensor twice to a compiled
# step. Under TorchTPU, programs are kept in that cache. The README says to give each
# layer a cache of its own.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cd "$work"
cat > program <<'EOF'
import sys

import torch


def update(a, b):
    a.add_(1)
    b.mul_(2)
    return a + b


def arguments():
    ones = torch.ones(4)
    return ones, torch.ones(4) if sys.argv[1] == "apart" else ones.view(4)


compiled = torch.compile(update)(*arguments())[0].item()
print(f"compiled {compiled}, eager {update(*arguments())[0].item()}")
EOF

export TORCHINDUCTOR_CACHE_DIR="$work/cache"
run() {
    "$work/venv/bin/python" program "$2" 2> "$work/errors" |
        sed "s/^/$1: /" | tee -a "$work/seen" || { cat "$work/errors" >&2; exit 1; }
}
run "two tensors of ones" apart
run "a tensor of ones and a view of it" view
export TORCHINDUCTOR_AUTOGRAD_CACHE=0
run "a tensor of ones and a view of it, without the cache" view

diff "$work/seen" - <<'EOF'
two tensors of ones: compiled 4.0, eager 4.0
a tensor of ones and a view of it: compiled 4.0, eager 8.0
a tensor of ones and a view of it, without the cache: compiled 8.0, eager 8.0
EOF

#!/usr/bin/env bash
# torch 2.13: a compiled function on disk keeps the operator of another process.
#
# Versions: torch 2.13.0, Python 3.11. Needs a C++ compiler, as torch.compile does.
#
# Seen: three processes share a cache directory. Each defines an operator by other
# operators (CompositeImplicitAutograd): the first adds 1, the others add 2.
#
#   adds 1: compiled 1.0, called 1.0
#   adds 2: compiled 1.0, called 2.0
#   adds 2, and says so: compiled 2.0, called 2.0
#
# The second one runs what the first one compiled, without a word. The key of the cache
# is made from the graph before operators are decomposed, where only the name stands.
# The third one put another value for the operator into
# `torch._inductor.config.unsafe_marked_cacheable_functions`.
#
# Expected: that what an operator decomposes into is a part of the key, or that graphs
# with such an operator are not kept.
#
# Why it matters here: the operator of this project is such a one on all devices but the
# CPU, and TorchTPU keeps compiled programs in that cache. After an update of the kernel
# the old one would run. `torch_rpa/bridges/torch_tpu.py` sets that value to a digest of
# the kernel, and `tests/torch_tpu/test_stale_kernels.py` runs such processes.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6

cd "$work"
cat > program <<'EOF'
import sys

import torch

amount, *marks = sys.argv[1:]
library = torch.library.Library("shop", "DEF")
library.define("add(Tensor x) -> Tensor")
library.impl("add", lambda x: x + int(amount), "CompositeImplicitAutograd")
if marks:
    torch._inductor.config.unsafe_marked_cacheable_functions = {
        "torch.ops.shop.add": marks[0]
    }


@torch.compile
def add(x):
    return torch.ops.shop.add(x)


zero = torch.zeros(1)
print(f"compiled {add(zero).item()}, called {torch.ops.shop.add(zero).item()}")
EOF

export TORCHINDUCTOR_CACHE_DIR="$work/cache"
run() {
    "$work/venv/bin/python" program "${@:2}" 2> "$work/errors" |
        sed "s/^/$1: /" | tee -a "$work/seen" || { cat "$work/errors" >&2; exit 1; }
}
run "adds 1" 1
run "adds 2" 2
run "adds 2, and says so" 2 two

diff "$work/seen" - <<'EOF'
adds 1: compiled 1.0, called 1.0
adds 2: compiled 1.0, called 2.0
adds 2, and says so: compiled 2.0, called 2.0
EOF

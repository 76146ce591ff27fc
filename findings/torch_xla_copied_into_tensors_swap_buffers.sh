#!/usr/bin/env bash
# torch_xla 2.9.0: tensors updated by `copy_` swap their buffers, at two copies a step.
#
# Versions: torch_xla 2.9.0, torch 2.9.1, on the XLA CPU device.
#
# Seen: two layers with a tensor each. A step gives the first tensor a new value, then
# the second one, which depends on the first. Only the order in which the two were
# allocated differs. [1, 0] means that each has the buffer that the other began with.
#
#   allocated in the order of use: buffers after each step [[0, 1], [0, 1], [0, 1]];
#   copies in the compiled step: 0
#   allocated in reverse: buffers after each step [[1, 0], [0, 1], [1, 0]];
#   copies in the compiled step: 2
#
# Expected: that a tensor updated in place keeps its buffer. torch_xla knows which
# parameter each output replaces, but pairs donated parameters with outputs of their
# size in order: outputs by the ids of their tensors, which `copy_` keeps, parameters by
# their place in the graph.
#
# Why it matters here: the paged caches of all layers have one size. A cache that is
# paired with another layer's buffer is copied as a whole in every step, and nothing
# but the time tells. `update_in_place` of torch_rpa gives each updated cache a fresh
# id, and the order of the operands does the rest: see
# `test_every_layer_keeps_its_own_buffer` in tests/torch_rpa/test_xla_in_place.py.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile \
    torch==2.9.1 torch_xla==2.9.0 numpy==2.4.6

cd "$work"
export XLA_FLAGS="--xla_dump_to=$work/dump --xla_dump_hlo_as_text"
PJRT_DEVICE=CPU "$work/venv/bin/python" - <<'EOF'
import pathlib
import re

import torch
import torch_xla


def buffer_of(tensor):
    return torch_xla._XLAC._unsafe_buffer_pointer(tensor)


def run(size, *, reverse):
    """Returns the buffers of both layers after each step, and the number of copies."""
    layers = [torch.zeros(size).to(torch_xla.device()) for _ in range(2)]
    torch_xla.sync(wait=True)
    first, second = reversed(layers) if reverse else layers
    buffers = [buffer_of(first), buffer_of(second)]
    history = []
    for _ in range(3):
        first.copy_(first + 1)
        second.copy_(second + first.sum())
        torch_xla.sync(wait=True)
        history.append([buffers.index(buffer_of(layer)) for layer in (first, second)])
    assert first[0].item() == 3 and second[0].item() == 6 * size
    pattern = re.compile(rf"= f32\[{size}\]\S* copy\(")
    copies = sum(
        len(pattern.findall(path.read_text()))
        for path in pathlib.Path("dump").glob("*after_optimizations.txt")
    )
    return history, copies


for size, reverse in ((1000, False), (2000, True)):
    history, copies = run(size, reverse=reverse)
    order = "in reverse" if reverse else "in the order of use"
    print(
        f"allocated {order}: buffers after each step {history}; "
        f"copies in the compiled step: {copies}"
    )
    kept, swapped = [0, 1], [1, 0]
    assert history == ([swapped, kept, swapped] if reverse else [kept] * 3)
    assert copies == (2 if reverse else 0)
EOF

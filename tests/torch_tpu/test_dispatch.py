"""Modes of torch that watch operators have their part in a call on ``tpu``."""

import pytest

from tests.support import compile_only_tpu

REASON = compile_only_tpu.reason_to_skip()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.slow,
]

CODE = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tests.torch_rpa.calls import make_call, to_device
from torch_rpa import ops

seen = []


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen.append(func)
        return func(*args, **(kwargs or {}))


call = to_device(make_call(dtype=torch.bfloat16), "tpu")
attend = torch.ops.rpa.ragged_paged_attention
for autograd in (torch.enable_grad, torch.no_grad, torch.inference_mode):
    with autograd():
        attend(*call)
        with Seen():
            attend(*call)
    # Without autograd the mode comes after the operator has been decomposed.
    assert seen[0] in (
        ops.ragged_paged_attention,
        ops.ragged_paged_attention_functional,
    )
    seen.clear()
print("done")
"""


def test_modes_see_the_operators(tmp_path):
    completed = compile_only_tpu.run("v6e", tmp_path, "-c", CODE)
    assert completed.stdout.splitlines()[-1] == "done"

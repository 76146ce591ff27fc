"""What test_compile_only_tpu.py runs on a compile-only TPU; prints JSON.

python -m tests.support.compile_only_tpu -m tests.support.compile_only_program CASE
"""

import json
import resource
import sys

import jax
import torch

SIZE = 256


def multiply_and_add(a, b):
    return torch.relu(a @ b) + a.sum()


def compiled():
    """Three calls of one compiled program, with other values each."""
    function = torch.compile(multiply_and_add, backend="tpu", fullgraph=True)
    b = torch.ones(SIZE, SIZE, device="tpu")
    sums = []
    for value in range(3):
        a = torch.full((SIZE, SIZE), float(value)).to("tpu")
        sums.append(function(a, b).cpu().sum().item())
    return sums


def eager():
    """Two multiplications, and copies to the device and back."""
    x = torch.ones(SIZE, SIZE, device="tpu")
    products = [(x @ x).cpu() for _ in range(2)]
    on_host = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    return {
        "sums": [product.sum().item() for product in products],
        "copied": on_host.to("tpu").cpu().tolist(),
    }


def add(total: jax.Array, x: jax.Array) -> jax.Array:
    return total + x


def message_of(call, *arguments):
    try:
        call(*arguments)
    except RuntimeError as error:
        return str(error)
    return None


def donated():
    """A donated tensor is used again, then overwritten, then used again."""
    pallas = torch.tpu.pallas  # pyright: ignore[reportAttributeAccessIssue]
    add_in_place = pallas.jax_op("tests::add", add, donate_argnums=(0,))
    total = torch.zeros(SIZE, SIZE, device="tpu")
    x = torch.ones(SIZE, SIZE, device="tpu")
    new_total = add_in_place(total, x)
    new_total.cpu()
    errors = {
        "read": message_of(total.cpu),
        "passed": message_of(lambda: add_in_place(total, x).cpu()),
    }
    total.copy_(new_total)
    errors["after copy_"] = message_of(lambda: add_in_place(total, x).cpu())
    return errors


def large():
    """Bytes of host memory that a tensor of 4 GiB and its double take."""

    def peak_bytes():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    small = torch.empty(SIZE, SIZE, device="tpu")
    (small + small).cpu()
    before = peak_bytes()
    x = torch.empty(2**30, dtype=torch.float32, device="tpu")
    y = x + x
    torch.accelerator.synchronize()
    return {"bytes": peak_bytes() - before, "elements": y.numel()}


CASES = {function.__name__: function for function in (eager, compiled, donated, large)}

if __name__ == "__main__":
    print(json.dumps({case: CASES[case]() for case in sys.argv[1:]}))

"""A bridge to torch's own lazy device, which every build of torch has.

It stands for the next framework: its device type, its way to end a step and its counts
are unlike those of torch_xla. The attention is the reference, on copies of the tensors
on the CPU, and calls are recorded.
"""

import contextlib
from typing import Any

import torch
import torch._lazy
import torch._lazy.metrics
import torch._lazy.ts_backend

from torch_rpa import reference as eager
from torch_rpa import validation
from torch_rpa.bridges.lowering import Target
from torch_rpa.options import make_options

torch._lazy.ts_backend.init()

calls: list[str] = []


def call(tensors, options, *, donate_kv_cache=False):
    """The reference on the CPU; what it gives is moved to the device."""
    calls.append("donating call" if donate_kv_cache else "call")
    inputs = validation.Inputs(*tensors)
    attention_options = make_options(options)
    validation.validate_static(inputs, attention_options)
    moved: list[Any] = [None if t is None else t.cpu() for t in inputs]
    on_cpu = validation.Inputs(*moved)
    out = eager.ragged_paged_attention_(on_cpu, attention_options)
    results = [*out] if isinstance(out, tuple) else [out]
    if attention_options.update_kv_cache:
        results.append(on_cpu.kv_cache)
    return [tensor.to(inputs.q.device) for tensor in results]


def donates(kv_cache):
    return True


def before_compiling():
    calls.append("before compiling")


def update_in_place(kv_cache, new_cache):
    calls.append("update")
    kv_cache.copy_(new_cache)


@contextlib.contextmanager
def reference(device):
    calls.append(f"reference on {device}")
    yield


def open_device(device):
    calls.append("open")
    if device.index not in (None, 0):
        raise ValueError(f"device must be lazy:0, got {device}")
    return torch.device("lazy:0")


def target(device):
    return Target("cpu", None, "reference")


def buffer_address(tensor):
    return None


def sync(*, wait=False):
    calls.append("wait" if wait else "sync")
    torch._lazy.mark_step(wait=wait)


def compiled(function):
    def run(*args, **kwargs):
        calls.append("compiled")
        return function(*args, **kwargs)

    return run


def num_compilations():
    return torch._lazy.metrics.counter_value("UncachedCompile") or 0


def keep_programs(directory):
    pass


def multiply_in_float32():
    calls.append("multiply in float32")

"""What torch_xla's own ways to call JAX make of this project's kernel.

    python -m tests.torch_rpa.call_jax_cases

In a process of its own: ``call_jax`` needs a stand-in for a package that is not
installed, and both ways need another ``jax.jit``. Prints the HLO of each way as JSON.
"""

import contextlib
import functools
import json
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch_xla
import torch_xla.core.xla_builder as xla_builder
import torch_xla.experimental.custom_kernel as custom_kernel

from tests.torch_rpa.calls import make_call
from torch_rpa import ops
from torch_rpa.bridges import lowering
from torch_rpa.bridges import torch_xla as xla_bridge
from torch_rpa.options import AttentionOptions

TARGET = lowering.Target("tpu", "v6e", "pallas")
OPTIONS = AttentionOptions(sm_scale=0.1)


class _JitForTpu:
    """``jax.jit(...).lower(...)`` for a TPU and not for JAX's default device."""

    def __init__(self, jit: Any, function: Any, **options: Any):
        self._jitted = jit(function, **options)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        with lowering.lowering_config():
            traced = self._jitted.trace(*args, **kwargs)
            return traced.lower(lowering_platforms=("tpu",))


@contextlib.contextmanager
def jit_for_tpu() -> Iterator[None]:
    """Replaces ``jax.jit`` in the files of torch_xla that lower."""
    jax = lowering.import_jax()
    jit = jax.jit

    def replacement(function: Any = None, **options: Any) -> Any:
        caller = sys._getframe(1).f_code.co_filename
        if function is None or "torch_xla" not in caller:
            make: Any = jit if function is None else functools.partial(jit, function)
            return make(**options)
        return _JitForTpu(jit, function, **options)

    with mock.patch.object(jax, "jit", replacement):
        yield


def stand_in_for_flax() -> None:
    """torchax, which is in the wheel of torch_xla, imports flax to save checkpoints."""
    flax, training = (types.ModuleType(name) for name in ("flax", "flax.training"))
    checkpoints = types.ModuleType("flax.training.checkpoints")
    vars(training)["checkpoints"] = checkpoints
    sys.modules.update({m.__name__: m for m in (flax, training, checkpoints)})
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchax"]:
        del sys.modules[name]  # what an import without flax has left


def error_of(function: Any, *args: Any) -> str | None:
    try:
        function(*args)
    except (AssertionError, ValueError) as error:
        return str(error)
    return None


def main() -> None:
    call = make_call(device=torch_xla.device())
    torch_xla.sync(wait=True)
    hlo_of = torch_xla._XLAC._get_xla_tensors_hlo
    function = lowering.jax_function(OPTIONS, TARGET)
    result: dict[str, str | None] = {}

    result["call_jax without flax"] = error_of(xla_builder.call_jax, function, call)
    stand_in_for_flax()
    result["call_jax without a TPU"] = error_of(xla_builder.call_jax, function, call)

    def results(*arrays: Any) -> Any:  # cached by its identity
        return function(*arrays)

    with jit_for_tpu():
        theirs: Any = xla_builder.call_jax(results, tuple(call))
        result["call_jax"] = hlo_of(list(theirs))
        wrapped: Any = custom_kernel.make_kernel_from_pallas(
            results,
            lambda *tensors: [(t.shape, t.dtype) for t in (call.q, call.kv_cache)],
        )
        result["make_kernel_from_pallas"] = hlo_of(list(wrapped(*call[:8])))
    with xla_bridge.lowering_target(TARGET):
        ours: Any = ops.ragged_paged_attention_functional(
            *call, sm_scale=OPTIONS.sm_scale
        )
    result["bridge"] = hlo_of(list(ours))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()

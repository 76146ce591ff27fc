"""The bridge to PyTorch/XLA: a JAX computation in the graph of torch_xla.

A function is traced and lowered once per signature. That gives an HLO computation,
which torch_xla puts into its own graph as it is: the custom call of the kernel, what is
computed before and after it, and the aliases by which the cache keeps its memory.

The computation object is kept and handed out again for the same signature. A new object
would change the hash of the graph, and every step would compile anew. All that block
sizes follow from is part of the signature, users' tuned records too: torch_xla keeps
compiled graphs without knowing how the kernel in them was made.

torch_xla 2.9.0 has two ways of its own to call JAX. Neither serves as it is, and
``tests/torch_rpa/test_call_jax.py`` holds this bridge against both.

``torch_xla.experimental.custom_kernel.make_kernel_from_pallas`` takes the kernel out of
the JAX function and calls it with the tensors of that function. It drops

* the aliases of the custom call, so that each step would copy every cache;
* whatever stands around the kernel, here the views by which two heads share a word;
* the order of the kernel's operands, which is not that of the function's arguments.

It also has one kernel for each call, and no result for a device without Pallas.

``torch_xla.core.xla_builder.call_jax`` makes the same custom call with the same aliases
as this bridge. But it

* lowers for the default device of JAX. That must not be the TPU, which belongs to
  torch_xla, and for a CPU there is no kernel: "Only interpret mode is supported on CPU
  backend". The platform is named here instead, and the chip comes from torch_xla;
* imports torchax, which is in the wheel of torch_xla and imports flax, which is not
  among its requirements. Without flax it says "Jax is required for this feature";
* keeps computations by ``id`` of the function: one made for each call is traced each
  time, compiled each time, and never forgotten;
* passes operands in the order of the arguments. torch_xla numbers the parameters of a
  graph by that order, and XLA pairs the buffers of donated caches by those numbers: see
  :func:`_in_call_order`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch_xla
import torch_xla.backends
import torch_xla.core.xla_builder as xla_builder
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics
import torch_xla.runtime
from torch_xla._dynamo import dynamo_bridge

from jax_kernels import chips
from torch_rpa import validation
from torch_rpa.bridges import lowering
from torch_rpa.bridges.lowering import Target
from torch_rpa.options import AttentionOptions, make_options
from torch_rpa.validation import Inputs

_PROGRAMS_VARIABLE = "XLA_PERSISTENT_CACHE_PATH"  # of torch_xla
CALL_NAME = "xla::ragged_paged_attention"


class _State(threading.local):
    target: Target | None = None


_state = _State()
_lock = threading.Lock()
_computations: dict[tuple, Any] = {}


# ---- the operator


def call(
    tensors: Sequence[Any], options: dict[str, Any], *, donate_kv_cache: bool = False
) -> list[torch.Tensor]:
    """Adds the attention to torch_xla's graph; see :meth:`torch_rpa.bridges.Bridge`."""
    signature = _state.target, *lowering.call_signature(tensors, options)
    computation = _computations.get(signature)
    if computation is None:
        computation = _prepare(signature, tensors, options)
    if validation.values_requested():
        validation.validate_values(Inputs(*tensors), make_options(options))
    operands = [t for t in _in_call_order(tensors) if t is not None]
    results = torch_xla._XLAC._xla_user_computation(CALL_NAME, operands, computation)
    if donate_kv_cache:
        _donate(tensors[3])
    return results


def donates(kv_cache: torch.Tensor) -> bool:
    """Lazy mode sees what is overwritten, and lets the new cache have its buffer."""
    return False


def before_compiling() -> None:
    """Nothing: torch_xla compiles anew in every process."""


def update_in_place(kv_cache: torch.Tensor, new_cache: torch.Tensor) -> None:
    """Makes ``new_cache`` the value of ``kv_cache`` in lazy mode.

    Where torch_xla's tensors are functionalized this does what functionalization makes
    of any ``foo_``, and it matters that it is not ``copy_``, which keeps the id of the
    tensor. XLA pairs donated parameters with outputs of their size in order, and
    torch_xla orders outputs by id: with a fresh id that is the order of execution,
    which is the order of the parameters too (see :func:`_in_call_order`). A cache
    paired with the buffer of another layer's would be copied in every step.
    """
    if not torch._is_functional_tensor(kv_cache):
        kv_cache.copy_(new_cache)
        return
    value = torch._from_functional_tensor(new_cache)
    old_value = torch._from_functional_tensor(kv_cache)
    torch.ops.aten._propagate_xla_data(old_value, value)
    torch._functionalize_replace(kv_cache, value)
    torch._functionalize_commit_update(kv_cache)
    torch._functionalize_sync(kv_cache)


def _donate(kv_cache: torch.Tensor) -> None:
    """Lets the graph being compiled reuse the buffer of this cache.

    Under ``torch.compile(backend="openxla")`` torch_xla aliases only the inputs that
    are marked while it extracts the graph. A mark made at any other time would stay on
    the buffer, and the next graph that happens to read the cache would free it: so in
    the trial runs that torch_xla does before, nothing is marked. A tensor that is no
    input of the graph, or that shares the buffer of another tensor (a lazy clone), is
    left alone.
    """
    if not _is_extracting_graph():
        return
    xlac = torch_xla._XLAC
    owner_ids = xlac._get_tensors_xla_device_data_node([kv_cache])[0]
    if owner_ids == [xlac._xla_get_tensor_id(kv_cache)]:
        xlac._set_buffer_donation(kv_cache, True)


def _is_extracting_graph() -> bool:
    """Whether the caller is run by torch_xla's dynamo bridge to extract its graph."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is dynamo_bridge.extract_graph_helper.__code__:
            return True
        frame = frame.f_back
    return False


def reference(device: torch.device) -> AbstractContextManager[None]:
    """Inside the block calls take the plain computation. Lazy mode only."""
    return lowering_target(device_target(device)._replace(implementation="reference"))


@contextlib.contextmanager
def lowering_target(target: Target | None) -> Iterator[None]:
    """Lowers the calls in this block for a target other than the device of the tensors.

    For tests, which compile the graph of a CPU process for a TPU, and for
    :func:`reference`. Lazy mode only.
    """
    previous, _state.target = _state.target, target
    try:
        yield
    finally:
        _state.target = previous


@functools.cache
def device_target(device: torch.device) -> Target:
    """Returns what to lower for on an XLA device of this process."""
    platform = torch_xla.runtime.device_type()
    # With SPMD all tensors are on one virtual device, of no kind.
    is_virtual = torch_xla.runtime.is_spmd()
    kind = "" if is_virtual else torch_xla._XLAC._xla_device_kind(str(device))
    if platform == "CPU":
        return Target("cpu", None, "reference")
    if platform == "TPU":
        accelerator = os.environ.get("TPU_ACCELERATOR_TYPE", "")
        chip = chips.short_name(kind) or chips.short_name(accelerator)
        return Target("tpu", chip, "pallas")
    raise NotImplementedError(
        f"rpa::ragged_paged_attention supports the XLA devices TPU and CPU, got "
        f"{platform}; set PJRT_DEVICE=TPU or PJRT_DEVICE=CPU"
    )


# ---- the device


def open_device(device: torch.device) -> torch.device:
    """Opens the XLA device of this process."""
    opened = torch_xla.device()
    if device.index not in (None, opened.index):
        raise ValueError(
            f"device must be {opened}, which is the XLA device of this process, got "
            f"{device}"
        )
    return opened


def target(device: torch.device) -> Target:
    """Returns what calls on the XLA device of this process are lowered for."""
    return device_target(device)


def buffer_address(tensor: torch.Tensor) -> int | None:
    """Returns where a tensor is in the memory of its device, after a sync.

    A TPU need not tell: then torch_xla raises an error.
    """
    xm.wait_device_ops()
    try:
        return torch_xla._XLAC._unsafe_buffer_pointer(tensor)
    except RuntimeError:
        return None


def sync(*, wait: bool = False) -> None:
    """Starts all that is pending; see :meth:`torch_rpa.bridges.Bridge.sync`."""
    torch_xla.sync(wait=wait)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function: what it does between two syncs is compiled anyway."""
    return function


def num_compilations() -> int:
    """Returns how many programs torch_xla has compiled in this process so far."""
    compile_times = torch_xla.debug.metrics.metric_data("CompileTime")
    return compile_times[0] if compile_times else 0


def keep_programs(directory: str) -> None:
    """Keeps programs on disk; see :meth:`torch_rpa.bridges.Bridge.keep_programs`.

    torch_xla finds them by a hash of the whole graph, the kernel in it included.
    """
    if torch_xla.runtime.device_type() == "CPU":
        raise NotImplementedError(
            "the CPU of torch_xla cannot load programs that were kept on disk: leave "
            f"out the directory of programs, got {directory!r}, or use a TPU"
        )
    if os.environ.get(_PROGRAMS_VARIABLE) == directory:
        return  # asked for before, here or by the user
    if torch_xla._XLAC._xla_computation_cache_is_initialized():
        raise RuntimeError(
            f"programs must be kept in {directory!r} from the first one on, got one "
            "already compiled: call torch_rpa.devices.keep_programs before models run"
        )
    torch_xla.runtime.initialize_cache(directory)


def multiply_in_float32() -> None:
    """Makes a TPU multiply float32 matrices in float32, from now on."""
    if torch_xla.runtime.device_type() == "TPU":
        torch_xla.backends.set_mat_mul_precision("highest")


# ---- lowering


def _prepare(signature: tuple, tensors: Sequence[Any], options: dict[str, Any]) -> Any:
    """Validates and lowers a new signature; returns its computation."""
    inputs, attention_options = Inputs(*tensors), make_options(options)
    validation.validate_static(inputs, attention_options)
    target = _state.target or device_target(inputs.q.device)
    with _lock:
        if signature not in _computations:
            _computations[signature] = _lower(
                inputs, attention_options, target, options.get("block_sizes")
            )
    return _computations[signature]


def _lower(
    inputs: Inputs,
    options: AttentionOptions,
    target: Target,
    block_sizes: Sequence[int] | None,
) -> Any:
    """Lowers the kernel or its reference to an XLA computation of torch_xla."""
    torch_xla._XLAC._init_computation_client()  # before JAX looks for devices
    function = lowering.jax_function(options, target, block_sizes)
    structs = lowering.shape_structs(_in_call_order(inputs))
    module = lowering.hlo_module(
        functools.partial(_in_call_order_of, function), structs, target.platform
    )
    return xla_builder.computation_from_module_proto("ragged_paged_attention", module)


def _in_call_order(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the tensors of :class:`Inputs` as the computation takes them.

    torch_xla numbers the parameters of a graph depth first, last operand first. With q
    last and the cache first, the caches of the layers before come before.
    """
    q, k, v, *rest = tensors
    return (*rest, v, k, q)


def _in_call_order_of(function: Callable, *operands: Any) -> tuple[Any, ...]:
    """Calls a function of :class:`Inputs` with operands in the order of a call."""
    *rest, v, k, q = operands
    return function(q, k, v, *rest)

"""The bridge to PyTorch/XLA: a JAX computation in the graph of torch_xla.

A function is traced and lowered once per signature. That gives an HLO computation,
which torch_xla puts into its own graph.

The computation object is kept and handed out again for the same signature. A new object
would change the hash of the graph, and every step would compile anew.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from jax_kernels import chips
from torch_rpa import validation
from torch_rpa.bridges import lowering
from torch_rpa.bridges.lowering import Target
from torch_rpa.options import AttentionOptions, make_options
from torch_rpa.validation import Inputs

CALL_NAME = "xla::ragged_paged_attention"


class _State(threading.local):
    target: Target | None = None


_state = _State()
_lock = threading.Lock()
_computations: dict[tuple, Any] = {}


def call(tensors: Sequence[Any], options: dict[str, Any]) -> list[torch.Tensor]:
    """Adds the attention to torch_xla's graph.

    Args:
        tensors: The tensors of :class:`Inputs`; trailing ones may be left out.
        options: Keyword arguments of the operator; defaults may be left out.

    Returns:
        ``[out, new_cache]``, or ``[out]`` if the cache is not updated.
    """
    signature = (
        _state.target,
        tuple(options.items()),
        *[None if t is None else (t.shape, t.dtype, t.device) for t in tensors],
    )
    entry = _computations.get(signature)
    if entry is None:
        entry = _prepare(signature, tensors, options)
    if validation.values_requested():
        validation.validate_values(Inputs(*tensors), make_options(options))
    user_computation, computation = entry
    operands = [t for t in _in_call_order(tensors) if t is not None]
    return user_computation(CALL_NAME, operands, computation)


def donate(kv_cache: torch.Tensor | None) -> None:
    """Lets the graph being compiled reuse the buffer of this cache.

    Under ``torch.compile(backend="openxla")`` torch_xla aliases only the inputs that
    are marked while it extracts the graph. A mark made at any other time would stay on
    the buffer, and the next graph that happens to read the cache would free it: so in
    the trial runs that torch_xla does before, nothing is marked. A tensor that is no
    input of the graph, or that shares the buffer of another tensor (a lazy clone), is
    left alone.
    """
    import torch_xla

    if not _is_extracting_graph():
        return
    xlac = torch_xla._XLAC
    owner_ids = xlac._get_tensors_xla_device_data_node([kv_cache])[0]
    if owner_ids == [xlac._xla_get_tensor_id(kv_cache)]:
        xlac._set_buffer_donation(kv_cache, True)


def _is_extracting_graph() -> bool:
    """Whether the caller is run by torch_xla's dynamo bridge to extract its graph."""
    from torch_xla._dynamo import dynamo_bridge

    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is dynamo_bridge.extract_graph_helper.__code__:
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def lowering_target(target: Target | None) -> Iterator[None]:
    """Lowers the calls in this block for a target other than the device of the tensors.

    For tests, which compile the graph of a CPU process for a TPU, and for
    ``impl="reference"`` on a TPU. Lazy mode only.
    """
    previous, _state.target = _state.target, target
    try:
        yield
    finally:
        _state.target = previous


@functools.cache
def device_target(device: torch.device) -> Target:
    """Returns what to lower for on an XLA device of this process."""
    import torch_xla
    import torch_xla.runtime

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


# ---- lowering


def _prepare(
    signature: tuple, tensors: Sequence[Any], options: dict[str, Any]
) -> tuple[Callable, Any]:
    """Validates and lowers a new signature."""
    inputs, attention_options = Inputs(*tensors), make_options(options)
    validation.validate_static(inputs, attention_options)
    target = _state.target or device_target(inputs.q.device)
    with _lock:
        if signature not in _computations:
            import torch_xla

            computation = _lower(inputs, attention_options, target)
            _computations[signature] = (
                torch_xla._XLAC._xla_user_computation,
                computation,
            )
    return _computations[signature]


def _lower(inputs: Inputs, options: AttentionOptions, target: Target) -> Any:
    """Lowers the kernel or its reference to an XLA computation of torch_xla."""
    import torch_xla
    import torch_xla.core.xla_builder as xla_builder

    torch_xla._XLAC._init_computation_client()  # before JAX looks for devices
    function = lowering.jax_function(options, target)
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

"""Lowers the JAX kernel for torch_xla, and runs it on plain CPU tensors for debugging.

The only file that imports both torch_xla and JAX. JAX is used as a compiler front end:
it traces the function once per signature and gives an HLO computation, which torch_xla
puts into its own graph. It never opens the TPU, which belongs to torch_xla.

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
from typing import Any, NamedTuple

import torch

from torch_rpa import validation
from torch_rpa.options import AttentionOptions
from torch_rpa.validation import Inputs

CALL_NAME = "xla::ragged_paged_attention"


class Target(NamedTuple):
    """What a computation is lowered for.

    Attributes:
        platform: "tpu" or "cpu", as JAX names them.
        chip: "v5e", "v6e", "tpu7x", ...; None if unknown or not a TPU.
        implementation: "pallas" or "reference".
    """

    platform: str
    chip: str | None
    implementation: str


class _State(threading.local):
    target: Target | None = None


_state = _State()
_lock = threading.Lock()
_computations: dict[tuple, Any] = {}


def call(tensors: Sequence[Any], options: dict[str, Any]) -> list[torch.Tensor]:
    """Adds the attention to torch_xla's graph.

    Args:
        tensors: The tensors of :class:`Inputs`; trailing ones may be left out.
        options: Keyword arguments of :class:`AttentionOptions`; defaults may be left
            out.

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
        validation.validate_values(Inputs(*tensors), AttentionOptions(**options))
    user_computation, computation = entry
    # torch_xla numbers the parameters of a graph depth first, last operand first. With
    # q last and the cache first, the caches of the layers before come before.
    q, k, v, *rest = tensors
    operands = [t for t in (*rest, v, k, q) if t is not None]
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
        return Target("tpu", chip_name(kind) or chip_name(accelerator), "pallas")
    raise NotImplementedError(
        f"rpa::ragged_paged_attention supports the XLA devices TPU and CPU, got "
        f"{platform}; set PJRT_DEVICE=TPU or PJRT_DEVICE=CPU"
    )


def chip_name(kind: str) -> str | None:
    """Returns the short name of a TPU chip, or None.

    "TPU v5 lite" (PJRT) and "v5litepod-8" (accelerator type) are both "v5e".
    """
    words = kind.lower().replace("tpu", "").replace("lite", "e").split("-")[0]
    compact = words.replace("pod", "").replace(" ", "").lstrip("v")
    names = {
        "4": "v4",
        "5": "v5p",
        "5p": "v5p",
        "5e": "v5e",
        "6e": "v6e",
        "7": "tpu7x",
        "7x": "tpu7x",
    }
    return names.get(compact)


# ---- lowering


def _prepare(
    signature: tuple, tensors: Sequence[Any], options: dict[str, Any]
) -> tuple[Callable, Any]:
    """Validates and lowers a new signature."""
    inputs, attention_options = Inputs(*tensors), AttentionOptions(**options)
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
    jax = _import_jax()
    q, k, v, *rest = inputs
    structs = [
        None if t is None else jax.ShapeDtypeStruct(tuple(t.shape), jax_dtype(t.dtype))
        for t in (*rest, v, k, q)
    ]
    keywords = jax_keywords(options, inputs.q.dtype)
    function = functools.partial(_run, _implementation(target), keywords)
    name = "ragged_paged_attention"
    with _lowering_config():
        traced = jax.jit(function, keep_unused=True).trace(*structs)
        lowered = traced.lower(lowering_platforms=(target.platform,))
        module = lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()
    return xla_builder.computation_from_module_proto(name, module)


def _run(
    implementation: Callable, keywords: dict[str, Any], *operands: Any
) -> tuple[Any, ...]:
    """The traced function, with the operands in the order of :func:`call`."""
    *rest, v, k, q = operands
    out, new_cache = implementation(q, k, v, *rest, **keywords)
    return (out, new_cache) if keywords["update_kv_cache"] else (out,)


def _implementation(target: Target) -> Callable:
    # The submodules, because the package and its function have the same name.
    if target.implementation == "reference":
        from jax_kernels.ragged_paged_attention import ragged_paged_attention_reference

        return ragged_paged_attention_reference
    from jax_kernels.ragged_paged_attention import ragged_paged_attention

    return functools.partial(ragged_paged_attention, chip=target.chip)


def jax_keywords(options: AttentionOptions, q_dtype: torch.dtype) -> dict[str, Any]:
    """Returns the options as keyword arguments of the JAX functions."""
    return vars(options) | {"out_dtype": jax_dtype(options.out_dtype or q_dtype)}


def jax_dtype(dtype: torch.dtype) -> Any:
    """Returns the NumPy dtype, ml_dtypes included, with the name of a torch dtype."""
    return _import_jax().numpy.dtype(str(dtype).removeprefix("torch."))


@functools.cache
def _import_jax() -> Any:
    """Imports JAX such that it never creates a client for the TPU."""
    import jax
    from jax._src import xla_bridge

    if not xla_bridge.backends_are_initialized():
        jax.config.update("jax_platforms", "cpu")
    return jax


@contextlib.contextmanager
def _lowering_config() -> Iterator[None]:
    """What torch_xla needs of JAX's configuration, whatever the process has set."""
    from jax._src import config

    with (
        config.enable_x64(False),
        # torch_xla partitions with GSPMD and does not know Shardy's dialect.
        config.use_shardy_partitioner(False),
        # The same program from everywhere: no call stacks in it.
        config.traceback_in_locations_limit(0),
    ):
        yield


# ---- the kernel on plain CPU tensors


def interpret_pallas_(
    inputs: Inputs, options: AttentionOptions, chip: str | None = None
) -> torch.Tensor:
    """Runs the Pallas kernel in TPU interpret mode on CPU tensors, in place.

    Slow: it simulates the TPU's memories and DMAs. Needs JAX but not torch_xla.
    """
    validation.validate_static(inputs, options)
    if inputs.q.device.type != "cpu":
        raise NotImplementedError(
            f'impl="pallas_interpret" runs on CPU tensors, got {inputs.q.device}; '
            "use impl=None there, or move the tensors with .cpu()"
        )
    jax = _import_jax()
    arguments = [None if t is None else jax.numpy.asarray(_to_numpy(t)) for t in inputs]
    out, new_cache = _interpreted(options, inputs.q.dtype, chip)(*arguments)
    if options.update_kv_cache:
        inputs.kv_cache.copy_(_from_numpy(new_cache, inputs.kv_cache.dtype))
    return _from_numpy(out, options.out_dtype or inputs.q.dtype)


@functools.cache
def _interpreted(
    options: AttentionOptions, q_dtype: torch.dtype, chip: str | None
) -> Callable:
    from jax_kernels.ragged_paged_attention import ragged_paged_attention

    return functools.partial(
        ragged_paged_attention,
        **jax_keywords(options, q_dtype),
        chip=chip,
        interpret=True,
    )


def _to_numpy(tensor: torch.Tensor) -> Any:
    """A NumPy array of the same values, dtypes unknown to NumPy included."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint8).numpy().view(jax_dtype(tensor.dtype))


def _from_numpy(array: Any, dtype: torch.dtype) -> torch.Tensor:
    import numpy as np

    contiguous = np.array(array)  # a writable copy
    return torch.from_numpy(contiguous.view(np.uint8)).view(dtype)

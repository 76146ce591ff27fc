"""The bridge to TorchTPU: a JAX function as an operator of ``tpu`` tensors.

``torch.tpu.pallas.jax_op`` makes a PyTorch operator of a JAX function. It traces the
function for the shapes of a call, and TorchTPU runs the program at once, or puts it
into the graph that ``torch.compile(backend="tpu")`` lowers: the implementation of an
operator is its lowering there. So one implementation serves both.

Options are bound to the function, so that such an operator has tensors only. There is
one for each set of options, which TorchTPU traces for each set of shapes.

**No stale kernels.** The name of an operator ends in a digest of all that its programs
follow from beside options and shapes: the source of the kernel, the chip, JAX, and
users' tuned records. The cache of ``torch.compile`` on disk is asked with the graph of
the user's code, before anything here is called. There stands the public operator, which
knows no kernel. :func:`before_compiling` puts the digest into the key of that cache.

**In place.** Whoever promises to overwrite the cache donates it: XLA gives its buffer
to the new cache, and :func:`update_in_place` makes that the value of the tensor, for
which TorchTPU only exchanges buffers. It cannot do so for a part of a larger tensor.
:func:`donates` warns of that. Nor does it see that a buffer has two owners: ``clone()``
and ``copy_`` let tensors share one until an operator of PyTorch writes to either. The
other owner is then left without a buffer, and its use is an error, no wrong number.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._inductor.config
from torch._guards import TracingContext

from jax_kernels import chips
from jax_kernels.contract.arguments import MAY_BE_NONE
from torch_rpa import validation
from torch_rpa.bridges import lowering, torch_tpu_launch
from torch_rpa.bridges.kernel_digest import kernel_digest
from torch_rpa.bridges.lowering import Target
from torch_rpa.options import AttentionOptions, make_options
from torch_rpa.validation import Inputs

DONATION_VARIABLE = "TORCH_RPA_EAGER_DONATION"
KV_CACHE = Inputs._fields.index("kv_cache")
# Each size of a step is a program. After 8 of them torch would run the next ones
# operation by operation. It has another limit of 256, for all functions of one code.
MAX_STEP_SIZES = 256


class _State(threading.local):
    implementation: str = "pallas"


_state = _State()
_lock = threading.Lock()
_operators: dict[str, Callable[..., Any]] = {}  # by name
_launchers: dict[tuple, Callable[..., Any]] = {}


# ---- the operator


def call(
    tensors: Sequence[Any], options: dict[str, Any], *, donate_kv_cache: bool = False
) -> Sequence[torch.Tensor]:
    """Runs the kernel, or lowers it; see :meth:`torch_rpa.bridges.Bridge.call`."""
    signature = (
        _state.implementation,
        donate_kv_cache,
        *lowering.call_signature(tensors, options),
    )
    launch = _launchers.get(signature)
    if launch is None:
        return _first_call(signature, tensors, options, donate_kv_cache)
    if validation.values_requested() and not _in_graph():
        validation.validate_values(Inputs(*tensors), make_options(options))
    return launch(tensors)


def _first_call(
    signature: tuple, tensors: Sequence[Any], options: dict[str, Any], donate: bool
) -> Sequence[torch.Tensor]:
    """Validates a new signature, has it traced, and keeps how to call it again."""
    inputs, attention_options = Inputs(*tensors), make_options(options)
    validation.validate_static(inputs, attention_options)
    if validation.values_requested() and not _in_graph():
        validation.validate_values(inputs, attention_options)
    with _lock, lowering.lowering_config():
        operator = _operator(attention_options, donate, options.get("block_sizes"))
        results = operator(*inputs)
        _launchers[signature] = torch_tpu_launch.launcher(operator, inputs)
    return (results,) if isinstance(results, torch.Tensor) else results


def donates(kv_cache: torch.Tensor) -> bool:
    """Whether the buffer of this cache is given away; see :class:`Bridge`.

    ``TORCH_RPA_EAGER_DONATION=0`` in the environment keeps it: then each call outside
    of ``torch.compile`` copies the cache. The first call of the process reads it.
    """
    num_bytes = kv_cache.numel() * kv_cache.element_size()
    storage_bytes = kv_cache.untyped_storage().nbytes()
    if num_bytes != storage_bytes:
        warnings.warn(
            f"kv_cache is a view of {num_bytes} bytes of a tensor of {storage_bytes} "
            "bytes. TorchTPU does not update a view in place: it copies the whole "
            "tensor in each call. Make one tensor for each layer, as "
            "torch_rpa.empty_kv_cache does",
            stacklevel=2,
        )
        return False
    return _donates_at_once()


@functools.cache
def _donates_at_once() -> bool:
    return os.environ.get(DONATION_VARIABLE, "1") != "0"


def update_in_place(kv_cache: torch.Tensor, new_cache: torch.Tensor) -> None:
    """Makes ``new_cache`` the value of ``kv_cache``: its storage takes the buffer."""
    kv_cache.copy_(new_cache)


def before_compiling() -> None:
    """Makes the digest of the kernel a part of the key of ``torch.compile``'s caches.

    The setting is torch's own for operators whose meaning can change. A library that
    sets another name of it is not disturbed, nor are graphs without the operator: a
    process that has not traced one yet does not come here.

    Raises:
        ValueError: torch would keep the graph together with how it is called. It looks
            for that before it traces anything: nobody could say which kernel is meant.
            (For a NotImplementedError it would call the operator outside of the graph.)
    """
    if getattr(torch._dynamo.config, "caching_precompile", False):
        raise ValueError(
            "torch._dynamo.config.caching_precompile (TORCH_CACHING_PRECOMPILE) must "
            "be False for rpa::ragged_paged_attention on a TPU, got True: after an "
            "update the former kernel would run. What torch.compile keeps on disk "
            "without it knows the kernel"
        )
    setting = torch._inductor.config.unsafe_marked_cacheable_functions
    name, digest = "torch.ops.rpa.ragged_paged_attention", _digest()
    if setting.get(name) != digest:
        torch._inductor.config.unsafe_marked_cacheable_functions = {
            **setting,
            name: digest,
        }
    if validation.values_requested():
        warnings.warn(
            f"{validation.VALIDATE_ENV} has no effect in a graph of torch.compile: "
            "there are no numbers yet. Run the model without torch.compile to check "
            "them",
            stacklevel=2,
        )


def reference(device: torch.device) -> AbstractContextManager[None]:
    """Inside the block calls that run at once take the plain computation."""
    return _implementation("reference")


@contextlib.contextmanager
def _implementation(name: str) -> Iterator[None]:
    previous, _state.implementation = _state.implementation, name
    try:
        yield
    finally:
        _state.implementation = previous


def _in_graph() -> bool:
    """Whether a graph of ``torch.compile`` is being lowered, in which no number is."""
    return TracingContext.try_get() is not None


# ---- the device


def open_device(device: torch.device) -> torch.device:
    """Opens the TensorCore of this process; see :class:`Bridge`.

    TorchTPU gives each process one of them.
    """
    opened = _open()
    if device.index not in (None, opened.index):
        raise ValueError(
            f"device must be {opened}, which is the one TPU device of this process, "
            f"got {device}; run one process for each TensorCore"
        )
    return opened


@functools.cache
def _open() -> torch.device:
    # Filled, since memory alone does not start the runtime that `chip` asks.
    return torch.zeros(1, device="tpu").device


def target(device: torch.device) -> Target:
    """Returns what calls on the TensorCore of this process are lowered for."""
    return Target("tpu", chip(), "pallas")


def buffer_address(tensor: torch.Tensor) -> int | None:
    """Returns None: ``data_ptr`` of TorchTPU is of a tensor, not of its buffer."""
    return None


def sync(*, wait: bool = False) -> None:
    """Waits if it shall: every call has started already."""
    if wait:
        torch.accelerator.synchronize()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function under ``torch.compile``, for static shapes."""
    limit: dict[str, Any] = {"recompile_limit": MAX_STEP_SIZES}  # unknown to torch 2.9
    return torch.compile(function, backend="tpu", dynamic=False, **limit)


def num_compilations() -> int:
    """Returns how many programs TorchTPU has compiled in this process so far."""
    return torch.tpu._get_cache_misses()  # pyright: ignore[reportAttributeAccessIssue]


def keep_programs(directory: str) -> None:
    """Keeps programs on disk; see :meth:`torch_rpa.bridges.Bridge.keep_programs`.

    ``torch.compile`` does so anyway, in a directory for temporary files. Programs of
    operators that run at once are not kept.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory


def multiply_in_float32() -> None:
    """Makes the TPU multiply float32 matrices in float32, from now on."""
    torch.set_float32_matmul_precision("highest")


@functools.cache
def chip() -> str | None:
    """Returns the short name of the chip of this process, None if it is unknown."""
    attributes = torch.tpu._get_local_device_attributes()  # pyright: ignore[reportAttributeAccessIssue]
    return chips.short_name(attributes["device_kind"])


def _load() -> None:
    """Makes the device known to torch, which ``import torch`` does where it may.

    Raises:
        ValueError: TorchTPU sees no TPU.
    """
    if _is_known():
        return
    from torch_tpu import _loader  # pyright: ignore

    _loader.load()
    if not _is_known():
        raise ValueError(
            "device 'tpu' needs a TPU, and TorchTPU sees none on this machine; use "
            "'cpu', where the operator means the same"
        )


def _is_known() -> bool:
    """Whether torch knows the device. ``torch.tpu`` is there without one as well."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == "tpu"


# ---- lowering


def _operator(
    options: AttentionOptions, donate: bool, block_sizes: Sequence[int] | None
) -> Callable[..., Any]:
    """Returns the PyTorch operator of the JAX function of these options."""
    target = Target("tpu", chip(), _state.implementation)
    sizes = None if block_sizes is None else tuple(block_sizes)
    name = f"rpa::torch_tpu_{_digest(options, donate, target, sizes)}"
    if name not in _operators:
        function = lowering.jax_function(options, target, block_sizes)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*jax_op is experimental.*")
            _operators[name] = torch.tpu.pallas.jax_op(  # pyright: ignore[reportAttributeAccessIssue]
                name,
                _annotated(function, lowering.num_results(options)),
                donate_argnums=[KV_CACHE] if donate else None,
            )
    return _operators[name]


def _annotated(function: Callable, num_results: int) -> Callable:
    """Returns the function with the signature that ``jax_op`` makes a schema of."""
    array = lowering.import_jax().Array

    def attend(*arrays: Any) -> Any:
        results = function(*arrays)
        return results if num_results > 1 else results[0]

    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=array | None if name in MAY_BE_NONE else array,
        )
        for name in Inputs._fields
    ]
    attend.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
        parameters,
        return_annotation=tuple[(array,) * num_results] if num_results > 1 else array,
    )
    return attend


def _digest(*others: object) -> str:
    return kernel_digest(chip(), *others)


_load()

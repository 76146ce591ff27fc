"""The operators of the ``rpa`` namespace: schemas, fakes and device implementations.

Three operators, one below the other::

    rpa::ragged_paged_attention              public; writes kv_cache in place
      rpa::ragged_paged_attention_functional    returns (out, new kv_cache)
      rpa::ragged_paged_attention_readonly      returns out; kv_cache is only read

On CPU tensors the public operator is the eager reference. Everywhere else it is
composite: it calls a functional operator and makes the new cache the value of
``kv_cache``, which is how PyTorch/XLA expresses an update in place (its
functionalization refuses custom operators that mutate). This module imports torch only;
torch_xla and JAX come in with the first call on an XLA device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensor

from jax_kernels.contract.options import check_bool
from torch_rpa import validation
from torch_rpa.options import (
    OPTIONS_SCHEMA,
    AttentionOptions,
    make_options,
    torch_dtype,
)
from torch_rpa.validation import Inputs

TENSORS_SCHEMA = (
    "Tensor q, Tensor? k, Tensor? v, {cache} kv_cache, Tensor kv_lens, "
    "Tensor page_indices, Tensor cu_q_lens, Tensor distribution, Tensor? sinks=None"
)
MUTATING_SCHEMA = (
    f"ragged_paged_attention({TENSORS_SCHEMA.format(cache='Tensor(a!)')}, *, "
    f"{OPTIONS_SCHEMA}) -> Tensor"
)
# donate_kv_cache: the caller promises to overwrite kv_cache with the second result, so
# a compiled graph may reuse its buffer.
FUNCTIONAL_SCHEMA = (
    f"ragged_paged_attention_functional({TENSORS_SCHEMA.format(cache='Tensor')}, *, "
    f"{OPTIONS_SCHEMA}, bool donate_kv_cache=False) -> (Tensor out, Tensor new_cache)"
)
READONLY_SCHEMA = (
    f"ragged_paged_attention_readonly({TENSORS_SCHEMA.format(cache='Tensor')}, *, "
    f"{OPTIONS_SCHEMA}) -> Tensor"
)

_library = torch.library.Library("rpa", "DEF")
_library.define(MUTATING_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.define(FUNCTIONAL_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.define(READONLY_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))

ragged_paged_attention = torch.ops.rpa.ragged_paged_attention.default
ragged_paged_attention_functional = (
    torch.ops.rpa.ragged_paged_attention_functional.default
)
ragged_paged_attention_readonly = torch.ops.rpa.ragged_paged_attention_readonly.default


# ---- the public operator


def _composite(*tensors: Any, **options: Any) -> torch.Tensor:
    """Any device but the CPU: the functional operator, then an update in place."""
    validation.validate_gradients(tensors)
    with torch._C._AutoDispatchBelowAutograd():
        if not _updates(options):
            return ragged_paged_attention_readonly(*tensors, **options)
        kv_cache = tensors[3]
        assert kv_cache is not None
        # Lazy torch_xla finds the update by itself, a graph of torch.compile does not.
        donate = isinstance(kv_cache, FunctionalTensor)
        out, new_cache = ragged_paged_attention_functional(
            *tensors, **options, donate_kv_cache=donate
        )
        update_in_place(kv_cache, new_cache)
        return out


def update_in_place(kv_cache: torch.Tensor, new_cache: torch.Tensor) -> None:
    """Makes ``new_cache`` the value of ``kv_cache``.

    Where tensors are functionalized this does what functionalization makes of any
    ``foo_``, and it matters that it is not ``copy_``:

    * In lazy mode torch_xla's ``copy_`` keeps the id of the tensor. XLA pairs donated
      parameters with outputs of their size in order, and torch_xla orders outputs by
      id: with a fresh id that is the order of execution, which is the order of the
      parameters too (see ``bridges.torch_xla``). A cache paired with the buffer of
      another layer's would be copied in every step.
    * In a graph of torch.compile, ``copy`` would make torch_xla output each cache
      twice, and XLA copy it for the second.
    """
    if isinstance(kv_cache, FunctionalTensor):
        assert isinstance(new_cache, FunctionalTensor)
        kv_cache.replace_(torch._from_functional_tensor(new_cache.elem))
        kv_cache.commit_update()
        kv_cache.sync()
    elif torch._is_functional_tensor(kv_cache):
        value = torch._from_functional_tensor(new_cache)
        old_value = torch._from_functional_tensor(kv_cache)
        torch.ops.aten._propagate_xla_data(old_value, value)
        torch._functionalize_replace(kv_cache, value)
        torch._functionalize_commit_update(kv_cache)
        torch._functionalize_sync(kv_cache)
    else:
        kv_cache.copy_(new_cache)


def _autograd_cpu(*tensors: Any, **options: Any) -> torch.Tensor:
    validation.validate_gradients(tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return ragged_paged_attention(*tensors, **options)


def _cpu(*tensors: Any, **options: Any) -> torch.Tensor:
    """CPU: the eager reference."""
    from torch_rpa import reference

    inputs, attention_options = Inputs(*tensors), make_options(options)
    if validation.values_requested():
        validation.validate_values(inputs, attention_options)
    return reference.ragged_paged_attention_(inputs, attention_options)


# ---- the functional operators


def _functional_autograd(*tensors: Any, **options: Any) -> Any:
    validation.validate_gradients(tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return ragged_paged_attention_functional(*tensors, **options)


def _readonly_autograd(*tensors: Any, **options: Any) -> torch.Tensor:
    validation.validate_gradients(tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return ragged_paged_attention_readonly(*tensors, **options)


def _functional_cpu(
    *tensors: Any, donate_kv_cache: bool = False, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    del donate_kv_cache  # a hint about memory
    _require_update(options)
    inputs = Inputs(*tensors)
    validation.validate_static(inputs, make_options(options))
    inputs = inputs._replace(
        kv_cache=inputs.kv_cache.clone(memory_format=torch.contiguous_format)
    )
    return _cpu(*inputs, **options), inputs.kv_cache


def _readonly_cpu(*tensors: Any, **options: Any) -> torch.Tensor:
    _require_no_update(options)
    return _cpu(*tensors, **options)


def _functional_xla(
    *tensors: Any, donate_kv_cache: bool = False, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    from torch_rpa.bridges import torch_xla as bridge

    _require_update(options)
    out, new_cache = bridge.call(tensors, options)
    if donate_kv_cache:
        bridge.donate(tensors[3])
    return out, new_cache


def _readonly_xla(*tensors: Any, **options: Any) -> torch.Tensor:
    from torch_rpa.bridges import torch_xla as bridge

    _require_no_update(options)
    (out,) = bridge.call(tensors, options)
    return out


def _functional_fake(
    *tensors: Any, donate_kv_cache: bool = False, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    del donate_kv_cache
    _require_update(options)
    inputs = Inputs(*tensors)
    return _fake_out(inputs, make_options(options)), torch.empty_like(
        inputs.kv_cache, memory_format=torch.contiguous_format
    )


def _readonly_fake(*tensors: Any, **options: Any) -> torch.Tensor:
    _require_no_update(options)
    return _fake_out(Inputs(*tensors), make_options(options))


def _unsupported_device(*tensors: Any, **options: Any) -> Any:
    del options
    devices = sorted({str(t.device) for t in tensors if t is not None})
    layouts = sorted({str(t.layout) for t in tensors if t is not None})
    raise NotImplementedError(
        f"rpa::ragged_paged_attention supports dense tensors on XLA devices (TPU or "
        f"CPU) and on the CPU, got {layouts} on {devices}; move the tensors to "
        "torch_xla.device() or to 'cpu'"
    )


def _fake_out(inputs: Inputs, options: AttentionOptions) -> torch.Tensor:
    sizes = validation.validate_static(inputs, options)
    return torch.empty_like(
        inputs.q,
        dtype=torch_dtype(sizes.out_dtype),
        memory_format=torch.contiguous_format,
    )


def _updates(options: dict[str, Any]) -> bool:
    return check_bool("update_kv_cache", options.get("update_kv_cache", True))


def _require_update(options: dict[str, Any]) -> None:
    if not _updates(options):
        raise ValueError(
            "update_kv_cache must be True for rpa::ragged_paged_attention_functional, "
            "got False; use rpa::ragged_paged_attention_readonly"
        )


def _require_no_update(options: dict[str, Any]) -> None:
    if _updates(options):
        raise ValueError(
            "update_kv_cache must be False for rpa::ragged_paged_attention_readonly, "
            "got True; use rpa::ragged_paged_attention_functional"
        )


_library.impl("ragged_paged_attention", _composite, "CompositeImplicitAutograd")
_library.impl("ragged_paged_attention", _cpu, "CPU")
_library.impl("ragged_paged_attention", _autograd_cpu, "AutogradCPU")

for _name, _autograd, _on_cpu, _on_xla, _fake in (
    (
        "ragged_paged_attention_functional",
        _functional_autograd,
        _functional_cpu,
        _functional_xla,
        _functional_fake,
    ),
    (
        "ragged_paged_attention_readonly",
        _readonly_autograd,
        _readonly_cpu,
        _readonly_xla,
        _readonly_fake,
    ),
):
    _library.impl(_name, _autograd, "Autograd")
    _library.impl(_name, _on_cpu, "CPU")
    _library.impl(_name, _on_xla, "XLA")
    _library.impl(_name, _unsupported_device, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rpa::{_name}", _fake, lib=_library)

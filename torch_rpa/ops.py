"""The operators of the ``rpa`` namespace: schemas, fakes and device implementations.

Three operators, one below the other::

    rpa::ragged_paged_attention              public; writes kv_cache in place
      rpa::ragged_paged_attention_functional    returns (out, new kv_cache)
      rpa::ragged_paged_attention_readonly      returns out; kv_cache is only read

On CPU tensors the public operator runs eagerly, in PyTorch. Everywhere else it is
composite: it calls a functional operator and makes the new cache the value of
``kv_cache``, which is how PyTorch/XLA expresses an update in place (its
functionalization refuses custom operators that mutate). This module imports torch only;
the bridge of a device comes in, with its framework and JAX, with the first call there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensor

from jax_kernels.contract.arguments import check_given
from jax_kernels.contract.options import check_bool
from torch_rpa import bridges, validation
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


# The keys of calls that, below autograd, concern the device alone: no mode, transform
# or subclass of tensors, and no functionalization, has a part in them. The dispatcher
# would come to the functions for all devices here as well. It takes longer.
_DEVICE = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
_OWN_KEYS = frozenset(
    keys.raw_repr()
    for keys in (_DEVICE, _DEVICE.add(torch._C.DispatchKey.AutogradPrivateUse1))
)


def _composite(
    keys: torch._C.DispatchKeySet, *tensors: Any, **options: Any
) -> torch.Tensor:
    """Any device but the CPU: the functional operator, then an update in place."""
    check_given(tensors)
    validation.validate_gradients(tensors)
    functional, readonly = (
        ragged_paged_attention_functional,
        ragged_paged_attention_readonly,
    )
    if keys.raw_repr() in _OWN_KEYS:
        functional, readonly = _functional_bridged, _readonly_bridged
    with torch._C._AutoDispatchBelowAutograd():
        if not _updates(options):
            return readonly(*tensors, **options)
        kv_cache = tensors[3]
        donate = isinstance(kv_cache, FunctionalTensor)  # in a graph of torch.compile
        if not donate:
            bridge = bridges.find(kv_cache.device.type)
            donate = bridge is not None and bridge.donates(kv_cache)
        out, new_cache = functional(*tensors, **options, donate_kv_cache=donate)
        update_in_place(kv_cache, new_cache)
        return out


def update_in_place(kv_cache: torch.Tensor, new_cache: torch.Tensor) -> None:
    """Makes ``new_cache`` the value of ``kv_cache``, in the way of its device.

    In a graph of torch.compile this does what functionalization makes of any ``foo_``.
    ``copy_`` there would make the framework output each cache twice, and XLA copy it
    for the second.
    """
    if isinstance(kv_cache, FunctionalTensor):
        assert isinstance(new_cache, FunctionalTensor)
        kv_cache.replace_(torch._from_functional_tensor(new_cache.elem))
        kv_cache.commit_update()
        kv_cache.sync()
        return
    bridge = bridges.find(kv_cache.device.type)
    if bridge is None:
        kv_cache.copy_(new_cache)
    else:
        bridge.update_in_place(kv_cache, new_cache)


def _autograd_cpu(*tensors: Any, **options: Any) -> torch.Tensor:
    validation.validate_gradients(tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return ragged_paged_attention(*tensors, **options)


def _cpu(*tensors: Any, **options: Any) -> torch.Tensor:
    """CPU: PyTorch, eagerly."""
    from torch_rpa import cpu

    inputs, attention_options = Inputs(*tensors), make_options(options)
    if validation.values_requested():
        validation.validate_values(inputs, attention_options)
    return cpu.ragged_paged_attention_(inputs, attention_options)


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


def _functional_bridged(
    *tensors: Any, donate_kv_cache: bool = False, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every device but the CPU: what its bridge computes."""
    _require_update(options)
    bridge = _bridge_of(tensors)
    out, new_cache = bridge.call(tensors, options, donate_kv_cache=donate_kv_cache)
    return out, new_cache


def _readonly_bridged(*tensors: Any, **options: Any) -> torch.Tensor:
    _require_no_update(options)
    (out,) = _bridge_of(tensors).call(tensors, options)
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


def _bridge_of(tensors: Sequence[Any]) -> bridges.Bridge:
    """Returns the bridge of the device of q; raises if there is none."""
    q = tensors[0]
    assert q is not None
    bridge = bridges.find(q.device.type)
    if bridge is not None:
        return bridge
    validation.validate_devices(Inputs(*tensors))
    devices = sorted({str(t.device) for t in tensors if t is not None})
    layouts = sorted({str(t.layout) for t in tensors if t is not None})
    supported = " or ".join(repr(name) for name in (*bridges.BRIDGES, "cpu"))
    raise NotImplementedError(
        f"rpa::ragged_paged_attention supports dense tensors on {supported}, got "
        f"{layouts} on {devices}; move the tensors to {supported}"
    )


def _fake_out(inputs: Inputs, options: AttentionOptions) -> torch.Tensor:
    sizes = validation.validate_static(inputs, options)
    bridge = bridges.find(inputs.q.device.type)
    if bridge is not None:
        bridge.before_compiling()
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


_library.impl(
    "ragged_paged_attention",
    _composite,
    "CompositeImplicitAutograd",
    with_keyset=True,
)
_library.impl("ragged_paged_attention", _cpu, "CPU")
_library.impl("ragged_paged_attention", _autograd_cpu, "AutogradCPU")

for _name, _autograd, _on_cpu, _bridged, _fake in (
    (
        "ragged_paged_attention_functional",
        _functional_autograd,
        _functional_cpu,
        _functional_bridged,
        _functional_fake,
    ),
    (
        "ragged_paged_attention_readonly",
        _readonly_autograd,
        _readonly_cpu,
        _readonly_bridged,
        _readonly_fake,
    ),
):
    _library.impl(_name, _autograd, "Autograd")
    _library.impl(_name, _on_cpu, "CPU")
    # For every kind of device that has no implementation of its own here.
    _library.impl(_name, _bridged, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rpa::{_name}", _fake, lib=_library)

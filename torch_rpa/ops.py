"""The operators of the ``rpa`` namespace: schemas, fakes and device implementations.

Three operators, one below the other::

    rpa::ragged_paged_attention              public; writes kv_cache in place
      rpa::ragged_paged_attention_functional    returns (out, new kv_cache)
      rpa::ragged_paged_attention_readonly      returns out; kv_cache is only read

Three more, whose names begin with ``ragged_paged_attention_with_lse``, return
``(out, lse)`` in the place of out.

On CPU tensors the public operator runs eagerly, in PyTorch. Everywhere else it is
composite: it calls a functional operator and makes the new cache the value of
``kv_cache``, which is how PyTorch/XLA expresses an update in place (its
functionalization refuses custom operators that mutate). This module imports torch only;
the bridge of a device comes in, with its framework and JAX, with the first call there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
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
    "Tensor page_indices, Tensor cu_q_lens, Tensor distribution, "
    + ", ".join(f"Tensor? {name}=None" for name in Inputs._field_defaults)
)

_library = torch.library.Library("rpa", "DEF")


@dataclasses.dataclass(frozen=True)
class Operators:
    """The three operators that return the same of the attention.

    Attributes:
        public: Writes kv_cache in place.
        functional: Returns the new cache, too, as its last result.
        readonly: Reads kv_cache.
        return_lse: Whether each returns the logarithms after the output.
    """

    public: torch._ops.OpOverload
    functional: torch._ops.OpOverload
    readonly: torch._ops.OpOverload
    return_lse: bool


def _define(name: str, return_lse: bool) -> Operators:
    results = ["Tensor out", "Tensor lse"] if return_lse else ["Tensor out"]
    attention = f"({', '.join(results)})" if return_lse else "Tensor"
    reading = TENSORS_SCHEMA.format(cache="Tensor")
    for schema in (
        f"{name}({TENSORS_SCHEMA.format(cache='Tensor(a!)')}, *, {OPTIONS_SCHEMA}) "
        f"-> {attention}",
        # donate_kv_cache: the caller promises to overwrite kv_cache with the last
        # result, so a compiled graph may reuse its buffer.
        f"{name}_functional({reading}, *, {OPTIONS_SCHEMA}, "
        f"bool donate_kv_cache=False) -> ({', '.join(results)}, Tensor new_cache)",
        f"{name}_readonly({reading}, *, {OPTIONS_SCHEMA}) -> {attention}",
    ):
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    public, functional, readonly = (
        getattr(torch.ops.rpa, name + suffix).default
        for suffix in ("", "_functional", "_readonly")
    )
    return Operators(public, functional, readonly, return_lse)


WITHOUT_LSE = _define("ragged_paged_attention", return_lse=False)
WITH_LSE = _define("ragged_paged_attention_with_lse", return_lse=True)

ragged_paged_attention = WITHOUT_LSE.public
ragged_paged_attention_functional = WITHOUT_LSE.functional
ragged_paged_attention_readonly = WITHOUT_LSE.readonly


# ---- the public operators


# The keys of calls that, below autograd, concern the device alone: no mode, transform
# or subclass of tensors, and no functionalization, has a part in them. The dispatcher
# would come to the functions for all devices here as well. It takes longer.
_DEVICE = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
_OWN_KEYS = frozenset(
    keys.raw_repr()
    for keys in (_DEVICE, _DEVICE.add(torch._C.DispatchKey.AutogradPrivateUse1))
)


def _composite(
    operators: Operators,
    keys: torch._C.DispatchKeySet,
    *tensors: Any,
    **options: Any,
) -> Any:
    """Any device but the CPU: the functional operator, then an update in place."""
    check_given(tensors)
    validation.validate_gradients(tensors)
    functional, readonly = operators.functional, operators.readonly
    if keys.raw_repr() in _OWN_KEYS:
        functional = functools.partial(_functional_bridged, operators)
        readonly = functools.partial(_readonly_bridged, operators)
    with torch._C._AutoDispatchBelowAutograd():
        if not _updates(options):
            return readonly(*tensors, **options)
        kv_cache = tensors[3]
        donate = isinstance(kv_cache, FunctionalTensor)  # in a graph of torch.compile
        if not donate:
            bridge = bridges.find(kv_cache.device.type)
            donate = bridge is not None and bridge.donates(kv_cache)
        *attention, new_cache = functional(*tensors, **options, donate_kv_cache=donate)
        update_in_place(kv_cache, new_cache)
        return _results(attention)


def _results(attention: Sequence[torch.Tensor]) -> Any:
    """What an operator returns of the output and, if it has them, the logarithms."""
    return tuple(attention) if len(attention) > 1 else attention[0]


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


def _below_autograd(
    operator: torch._ops.OpOverload, *tensors: Any, **options: Any
) -> Any:
    validation.validate_gradients(tensors)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*tensors, **options)


def _cpu(operators: Operators, *tensors: Any, **options: Any) -> Any:
    """CPU: PyTorch, eagerly."""
    from torch_rpa import cpu

    inputs, attention_options = Inputs(*tensors), _options(operators, options)
    if validation.values_requested():
        validation.validate_values(inputs, attention_options)
    return cpu.ragged_paged_attention_(inputs, attention_options)


def _options(operators: Operators, options: dict[str, Any]) -> AttentionOptions:
    return make_options(_with_lse(operators, options))


def _with_lse(operators: Operators, options: dict[str, Any]) -> dict[str, Any]:
    """The options with that which the name of an operator says."""
    return options | {"return_lse": True} if operators.return_lse else options


# ---- the functional operators


def _functional_cpu(
    operators: Operators, *tensors: Any, donate_kv_cache: bool = False, **options: Any
) -> tuple[torch.Tensor, ...]:
    del donate_kv_cache  # a hint about memory
    _require_update(options)
    inputs = Inputs(*tensors)
    validation.validate_static(inputs, _options(operators, options))
    inputs = inputs._replace(
        kv_cache=inputs.kv_cache.clone(memory_format=torch.contiguous_format)
    )
    attention = _cpu(operators, *inputs, **options)
    attention = attention if operators.return_lse else (attention,)
    return (*attention, inputs.kv_cache)


def _readonly_cpu(operators: Operators, *tensors: Any, **options: Any) -> Any:
    _require_no_update(options)
    return _cpu(operators, *tensors, **options)


def _functional_bridged(
    operators: Operators, *tensors: Any, donate_kv_cache: bool = False, **options: Any
) -> tuple[torch.Tensor, ...]:
    """Every device but the CPU: what its bridge computes."""
    _require_update(options)
    options = _with_lse(operators, options)
    bridge = _bridge_of(tensors)
    return tuple(bridge.call(tensors, options, donate_kv_cache=donate_kv_cache))


def _readonly_bridged(operators: Operators, *tensors: Any, **options: Any) -> Any:
    _require_no_update(options)
    options = _with_lse(operators, options)
    return _results(_bridge_of(tensors).call(tensors, options))


def _functional_fake(
    operators: Operators, *tensors: Any, donate_kv_cache: bool = False, **options: Any
) -> tuple[torch.Tensor, ...]:
    del donate_kv_cache
    _require_update(options)
    inputs = Inputs(*tensors)
    attention = _fake_attention(inputs, _options(operators, options))
    new_cache = torch.empty_like(inputs.kv_cache, memory_format=torch.contiguous_format)
    return (*attention, new_cache)


def _readonly_fake(operators: Operators, *tensors: Any, **options: Any) -> Any:
    _require_no_update(options)
    return _results(_fake_attention(Inputs(*tensors), _options(operators, options)))


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


def _fake_attention(inputs: Inputs, options: AttentionOptions) -> list[torch.Tensor]:
    sizes = validation.validate_static(inputs, options)
    bridge = bridges.find(inputs.q.device.type)
    if bridge is not None:
        bridge.before_compiling()
    out = torch.empty_like(
        inputs.q,
        dtype=torch_dtype(sizes.out_dtype),
        memory_format=torch.contiguous_format,
    )
    if not options.return_lse:
        return [out]
    return [out, inputs.q.new_empty(inputs.q.shape[:2], dtype=torch.float32)]


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


def _implement(operators: Operators) -> None:
    def of(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(function, operators)

    public = operators.public._opname
    _library.impl(public, of(_composite), "CompositeImplicitAutograd", with_keyset=True)
    _library.impl(public, of(_cpu), "CPU")
    _library.impl(
        public, functools.partial(_below_autograd, operators.public), "AutogradCPU"
    )
    for operator, on_cpu, bridged, fake in (
        (operators.functional, _functional_cpu, _functional_bridged, _functional_fake),
        (operators.readonly, _readonly_cpu, _readonly_bridged, _readonly_fake),
    ):
        name = operator._opname
        autograd = functools.partial(_below_autograd, operator)
        _library.impl(name, autograd, "Autograd")
        _library.impl(name, of(on_cpu), "CPU")
        # For every kind of device that has no implementation of its own here.
        _library.impl(name, of(bridged), "CompositeExplicitAutograd")
        torch.library.register_fake(f"rpa::{name}", of(fake), lib=_library)


_implement(WITHOUT_LSE)
_implement(WITH_LSE)

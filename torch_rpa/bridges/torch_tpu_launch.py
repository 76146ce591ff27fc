"""A short way to a program that an operator of ``torch.tpu.pallas.jax_op`` has run.

Such an operator binds its arguments to a signature, normalises them, and makes a text
of all shapes and dtypes, in each call: most of what a call costs the host. The bridge
knows the shapes already. With TorchTPU as it is, the function at the end of that way
can be called instead, with the same arguments. Where TorchTPU has other parts than
these, the operator is called: it costs more, and does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_rpa.validation import Inputs

Launch = Callable[[Sequence[torch.Tensor | None]], Sequence[torch.Tensor]]


def launcher(operator: Any, inputs: Inputs) -> Launch:
    """Returns what to call with tensors of the same shapes and dtypes.

    Args:
        operator: From ``jax_op``; it has been called with ``inputs``.
        inputs: The tensors of that call.

    Returns:
        A function of the tensors that returns a sequence of what the operator does.
    """
    try:
        return _direct(operator, inputs)
    except (AttributeError, ImportError, KeyError, TypeError):
        return through(operator)


def through(operator: Any) -> Launch:
    """The public way, which binds the arguments anew in each call."""

    def launch(tensors: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor]:
        given: list[Any] = list(tensors)
        results = operator(*Inputs(*given))  # with None for those left out
        return (results,) if isinstance(results, torch.Tensor) else results

    return launch


def _direct(operator: Any, inputs: Inputs) -> Launch:
    from torch_tpu._internal.pallas import pallas, tpu_torch_pallas  # pyright: ignore

    function = operator._init_fn
    key = pallas._get_kernel_invocation_key(function.trace_key, inputs, {})
    name = function.name
    fingerprint = function.kernel_key_to_mlir_fingerprint[key]
    output_shapes, _ = function.output_shapes[key]
    given = [t is not None for t in inputs]
    donated = [sum(given[:n]) for n in function.donate_argnums]
    run, exists = (
        tpu_torch_pallas.call_custom_kernel,
        tpu_torch_pallas.lookup_custom_kernel,
    )
    public = through(operator)

    def launch(tensors: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor]:
        if not exists(name, fingerprint):  # its programs were dropped
            return public(tensors)
        return run(
            name,
            fingerprint,
            inputs=[t for t in tensors if t is not None],
            output_shapes=output_shapes,
            donate_argnums=donated,
        )

    return launch

"""The Pallas kernel in TPU interpret mode on plain CPU tensors, for debugging."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from torch_rpa import validation
from torch_rpa.bridges import lowering
from torch_rpa.options import AttentionOptions, torch_dtype
from torch_rpa.validation import Inputs


def interpret_pallas_(
    inputs: Inputs,
    options: AttentionOptions,
    chip: str | None = None,
    block_sizes: tuple[int, int, int] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Runs the Pallas kernel in TPU interpret mode on CPU tensors, in place.

    Returns what :func:`torch_rpa.reference.ragged_paged_attention_` does. Slow: it
    simulates the TPU's memories and DMAs. Needs JAX and no bridge to a device.
    """
    sizes = validation.validate_static(inputs, options)
    if inputs.q.device.type != "cpu":
        raise NotImplementedError(
            f'impl="pallas_interpret" runs on CPU tensors, got {inputs.q.device}; '
            "use impl=None there, or move the tensors with .cpu()"
        )
    validation.validate_ranges(inputs, sizes, options)
    jax = lowering.import_jax()
    arguments = [None if t is None else jax.numpy.asarray(_to_numpy(t)) for t in inputs]
    shapes = tuple(
        None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments
    )
    program = _compiled(options, chip, block_sizes, shapes)
    out, *lse, new_cache = program(*arguments)
    if options.update_kv_cache:
        inputs.kv_cache.copy_(_from_numpy(new_cache, inputs.kv_cache.dtype))
    attention = _from_numpy(out, torch_dtype(sizes.out_dtype))
    return (attention, _from_numpy(lse[0], torch.float32)) if lse else attention


# Each takes about a thousand memory maps, of which a process has 65,530.
@functools.lru_cache(maxsize=8)
def _compiled(
    options: AttentionOptions,
    chip: str | None,
    block_sizes: tuple[int, int, int] | None,
    shapes: tuple[Any, ...],
) -> Callable:
    from jax_kernels.ragged_paged_attention import BlockSizes, ragged_paged_attention

    function = functools.partial(
        ragged_paged_attention,
        block_sizes=None if block_sizes is None else BlockSizes(*block_sizes),
        chip=chip,
        interpret=True,
    )
    with_arrays = lowering.with_array_options(function, vars(options))
    jax = lowering.import_jax()
    return jax.jit(with_arrays).lower(*shapes).compile(_quick_compilation(jax))


def _quick_compilation(jax: Any) -> dict[str, int | bool]:
    """Options of XLA: to compile a program takes longer than to run it."""
    options: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
    if jax.__version_info__ < (0, 11, 1):
        # A fifth of the time. Later releases have no other emitters.
        options["xla_cpu_use_fusion_emitters"] = False
    return options


def _to_numpy(tensor: torch.Tensor) -> Any:
    """Returns a NumPy array of the same values, also of a dtype unknown to NumPy."""
    # Not contiguous(), whose result may have any stride along an axis of one.
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).view(-1)
    data = flat.view(torch.uint8).numpy()
    return data.view(lowering.jax_dtype(tensor.dtype)).reshape(tensor.shape)


def _from_numpy(array: Any, dtype: torch.dtype) -> torch.Tensor:
    import numpy as np

    contiguous = np.array(array)  # a writable copy
    return torch.from_numpy(contiguous.view(np.uint8)).view(dtype)

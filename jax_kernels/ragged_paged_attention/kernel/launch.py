"""Assembles the one ``pallas_call``: arguments, aliases by name, compiler options."""

import functools
import os

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.config import KernelConfig
from jax_kernels.ragged_paged_attention.kernel import entry, padding, refs

KERNEL_NAME = "rpa"


def launch(
    scalars: refs.ScalarRefs,
    inputs: refs.Inputs,
    config: KernelConfig,
    *,
    vmem_limit_bytes: int,
    interpret_params: pltpu.InterpretParams | None = None,
) -> refs.Outputs:
    """Runs the kernel.

    Args:
      scalars: i32 arrays that go to SMEM.
      inputs: Arrays in the views that ``refs.Inputs`` names.
      config: Everything static.
      vmem_limit_bytes: What the compiler may use of VMEM.
      interpret_params: Options of Pallas TPU interpret mode, or None to compile.

    Returns:
      The output, and the cache when it was updated.
    """
    outputs = refs.output_shapes(config)
    scratch = padding.allocate(config)
    references = scalars, inputs, outputs, scratch
    out = pl.pallas_call(
        functools.partial(_entry, jax.tree.structure(references), config),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(jax.tree.leaves(scalars)),
            grid=(1,),
            in_specs=block_specs(inputs),
            out_specs=block_specs(outputs),
            scratch_shapes=jax.tree.leaves(scratch),
        ),
        out_shape=jax.tree.leaves(outputs),
        input_output_aliases=aliases(scalars, inputs, outputs),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vmem_limit_bytes,
            disable_bounds_checks=not checks_bounds(),
        ),
        interpret=interpret_params or False,
        name=KERNEL_NAME,
    )(*jax.tree.leaves((scalars, inputs)))
    return jax.tree.unflatten(jax.tree.structure(outputs), out)


def checks_bounds() -> bool:
    """Whether kernels traced from now on check every address: a switch for debugging.

    It is the environment variable ``RPA_BOUNDS_CHECKS``, on when it is 1. The checks
    are instructions of the program, which halts at the first address outside its
    array, so they cost time. JAX keeps what it has traced: set the variable before the
    process starts.

    Raises:
      ValueError: The variable is neither 0 nor 1, nor empty.
    """
    name = "RPA_BOUNDS_CHECKS"
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name}: expected 0 or 1, got {value!r}")
    return value == "1"


def _present(arrays) -> list[str]:
    """The fields that are not None, in the order in which Pallas counts them."""
    return [
        name
        for name, array in zip(arrays._fields, arrays, strict=True)
        if array is not None
    ]


def block_specs(arrays) -> list[pl.BlockSpec]:
    """Where the arrays of ``Inputs`` or of ``Outputs`` are."""
    spaces = refs.memory_spaces(type(arrays))
    return [pl.BlockSpec(memory_space=spaces[name]) for name in _present(arrays)]


def aliases(
    scalars: refs.ScalarRefs, inputs: refs.Inputs, outputs: refs.Outputs
) -> dict[int, int]:
    """Positions of the inputs whose memory an output takes over, and of the outputs."""
    operands = _present(scalars) + _present(inputs)
    return {
        operands.index(name): position
        for position, name in enumerate(_present(outputs))
        if name in operands
    }


def _entry(structure, config: KernelConfig, *flat_refs) -> None:
    """Puts the flat references of Pallas back into their places."""
    entry.rpa_kernel(*jax.tree.unflatten(structure, flat_refs), config=config)

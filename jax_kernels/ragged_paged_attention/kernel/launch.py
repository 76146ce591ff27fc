"""Assembles the one ``pallas_call``: arguments, aliases by name, compiler options."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.config import KernelConfig
from jax_kernels.ragged_paged_attention.kernel import entry, refs

KERNEL_NAME = "rpa"


def launch(
    scalars: refs.ScalarRefs,
    inputs: refs.HbmInputs,
    config: KernelConfig,
    *,
    vmem_limit_bytes: int,
    interpret_params: pltpu.InterpretParams | None = None,
) -> refs.HbmOutputs:
    """Runs the kernel.

    Args:
      scalars: i32 arrays that go to SMEM.
      inputs: Arrays in the views that ``refs.HbmInputs`` names.
      config: Everything static.
      vmem_limit_bytes: What the compiler may use of VMEM.
      interpret_params: Options of Pallas TPU interpret mode, or None to compile.

    Returns:
      The output, and the cache when it was updated.
    """
    out_shape = refs.HbmOutputs(
        out=jax.ShapeDtypeStruct(_out_shape(config), config.out_dtype),
        kv_cache=(
            jax.ShapeDtypeStruct(config.cache.shape, config.cache.dtype)
            if config.spec.update_kv_cache
            else None
        ),
    )
    in_hbm, in_smem = (
        pl.BlockSpec(memory_space=space) for space in (pl.ANY, pltpu.SMEM)
    )
    in_specs = refs.HbmInputs(
        *(
            None if array is None else in_smem if name == "sinks" else in_hbm
            for name, array in zip(inputs._fields, inputs, strict=True)
        )
    )
    groups = (scalars, inputs, out_shape)
    operands = jax.tree.leaves((scalars, inputs))
    aliases = {}
    if config.spec.update_kv_cache:
        # Positions count the arrays that are present, scalars first.
        before = inputs._replace(kv_cache=None, sinks=None)
        aliases[len(jax.tree.leaves((scalars, before)))] = 1
    zeros_shape, zeros_dtype = refs.zero_rows_shape(config)
    out = pl.pallas_call(
        functools.partial(_entry, jax.tree.structure(groups), config),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=jax.tree.leaves(in_specs),
            out_specs=[in_hbm] * len(jax.tree.leaves(out_shape)),
            scratch_shapes=[
                pltpu.VMEM(zeros_shape, zeros_dtype),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        out_shape=jax.tree.leaves(out_shape),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vmem_limit_bytes,
            disable_bounds_checks=True,
        ),
        interpret=interpret_params or False,
        name=KERNEL_NAME,
    )(*operands)
    return refs.HbmOutputs(*out, *[None] * (2 - len(out)))


def _entry(structure, config: KernelConfig, *flat_refs) -> None:
    """Puts the flat references of Pallas back into their groups."""
    *group_refs, zeros, clear_semaphore = flat_refs
    scalars, inputs, outputs = jax.tree.unflatten(structure, group_refs)
    entry.rpa_kernel(scalars, inputs, outputs, zeros, clear_semaphore, config=config)


def _out_shape(config: KernelConfig) -> tuple[int, ...]:
    packing = 4 // jnp.dtype(config.out_dtype).itemsize
    return (
        config.num_tokens,
        config.num_q_heads // packing,
        packing,
        config.io_lanes,
    )

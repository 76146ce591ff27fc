"""The kernel's references in named tuples; a field says where its array is.

Whoever adds an array adds a field here: ``launch.py`` finds memory space, position
and alias of every array by its field.
"""

from typing import Annotated, Any, NamedTuple, TypeAlias, get_type_hints

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.config import KernelConfig, PhaseConfig
from jax_kernels.ragged_paged_attention.token_layout import TokenRows

# A reference, with the memory space that the launch puts it in. Where it is left to
# the compiler, large arrays are in HBM.
InHbm: TypeAlias = Annotated[Any, pl.ANY]
InSmem: TypeAlias = Annotated[Any, pltpu.SMEM]


class ScalarRefs(NamedTuple):
    """Lengths and page table, in SMEM before the kernel starts."""

    kv_lens: Any  # i32[S]
    page_indices: Any  # i32[S * P]
    cu_q_lens: Any  # i32[S + 1]
    distribution: Any  # i32[3]


class Inputs(NamedTuple):
    """Arrays that are read, in views of token_layout.py and of layout.py."""

    queries: InHbm  # KernelConfig.query_layout: [T, word rows, packing, row_lanes]
    keys: InHbm  # KernelConfig.new_token_layout, or None
    values: InHbm  # the same
    kv_cache: InHbm  # CacheLayout.shape
    sinks: InSmem  # f32[Hq], or None
    head_factors: InSmem = None  # f32[Numerics.head_factors * Hkv], or None


class Outputs(NamedTuple):
    """Arrays that are written; one with the name of an input is the same memory."""

    out: InHbm  # KernelConfig.out_layout: [T, word rows, packing, row_lanes]
    lse: InHbm  # KernelConfig.lse_layout: [T, word rows, 1, 128], or None
    kv_cache: InHbm  # CacheLayout.shape, or None when nothing is written


def memory_spaces(fields: type) -> dict[str, Any]:
    """The memory space of each field of ``Inputs`` or ``Outputs``."""
    hints = get_type_hints(fields, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


def output_shapes(config: KernelConfig) -> Outputs:
    """What the launch returns; None for what this one does not."""

    def tokens(layout: TokenRows) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(layout.shape(config.num_tokens), layout.dtype)

    cache = jax.ShapeDtypeStruct(config.cache.shape, config.cache.dtype)
    return Outputs(
        out=tokens(config.out_layout),
        lse=tokens(config.lse_layout) if config.spec.return_lse else None,
        kv_cache=cache if config.spec.update_kv_cache else None,
    )


class Shaped(NamedTuple):
    """Shape and dtype of a buffer in VMEM."""

    shape: tuple[int, ...]
    dtype: Any


class Rings(NamedTuple):
    """VMEM that the copies of a phase fill and drain.

    ``tokens`` is ``block_q`` for tiles. In decode it is a token for each cell of a
    step, and one more in ``out``, which is never sent.
    """

    queries: Any  # [io slots, tokens, word rows, packing, row_lanes]
    keys: Any  # see new_tokens.ring_shape, or None
    values: Any  # the same
    kv: Any  # [slots, heads_per_page, cells * block rows, packing, lanes]
    out: Any  # [io slots, tokens, word rows, packing, row_lanes]
    lse: Any  # [io slots, tokens, word rows, 1, 128], or None


class Bookkeeping(NamedTuple):
    """SMEM of one phase."""

    notes: Any  # i32[numbers]: the cells or steps in flight
    written_rows: Any  # i32[slots]: packed rows being written back from a slot
    out_tokens: Any  # i32[io slots]: output tokens being sent from a slot


class Semaphores(NamedTuple):
    """DMA semaphores of one phase, one per slot of each ring."""

    kv: Any
    new_kv: Any
    queries: Any
    write_back: Any
    out: Any


def is_shaped(value) -> bool:
    return isinstance(value, Shaped)


def allocate_buffers(shapes):
    """Scratch types of buffers: the same tree with VMEM in the place of ``Shaped``."""
    return jax.tree.map(lambda entry: pltpu.VMEM(*entry), shapes, is_leaf=is_shaped)


def allocate_bookkeeping(phase: PhaseConfig, num_notes: int) -> Bookkeeping:
    """Scratch types."""
    return Bookkeeping(
        notes=pltpu.SMEM((num_notes,), jnp.int32),
        written_rows=pltpu.SMEM((phase.num_slots,), jnp.int32),
        out_tokens=pltpu.SMEM((phase.num_io_slots,), jnp.int32),
    )


def allocate_semaphores(phase: PhaseConfig) -> Semaphores:
    """Scratch types."""
    return Semaphores(
        *(pltpu.SemaphoreType.DMA((phase.num_slots,)) for _ in Semaphores._fields)
    )

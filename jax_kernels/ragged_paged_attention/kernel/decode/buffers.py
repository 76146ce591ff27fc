"""VMEM and SMEM of decode."""

import dataclasses
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.config import (
    SUBLANES,
    KernelConfig,
    PhaseConfig,
)
from jax_kernels.ragged_paged_attention.kernel import new_tokens, refs, tile_io
from jax_kernels.ragged_paged_attention.kernel.decode.steps import (
    step_structure,
    tokens_per_step,
)
from jax_kernels.ragged_paged_attention.kernel.online_softmax import SoftmaxState
from jax_kernels.ragged_paged_attention.kernel.phase import PhaseContext
from jax_kernels.ragged_paged_attention.kernel.refs import Shaped
from jax_kernels.ragged_paged_attention.kernel.schedule import Int, Schedule
from jax_kernels.ragged_paged_attention.layout import LANES

# What query rows, or their scores and outputs, are multiplied by.
ROW_FACTORS = ("query", "score", "output")


class Buffers(NamedTuple):
    """VMEM; a slot of the rings holds the cells of one step side by side."""

    rings: refs.Rings
    sinks: Any  # f32[softmax tiles, query rows, 128]: where rows start, or None
    row_factors: Any  # f32[factors, softmax tiles, query rows, 128], or None: those of
    # Numerics.head_factors that are among ROW_FACTORS, in this order
    state: Any  # SoftmaxState of all softmax tiles; None: no cell needs another's


DecodeContext: TypeAlias = PhaseContext[Buffers]


def with_kv_ring(context: DecodeContext, index: int) -> DecodeContext:
    """A context whose ``rings.kv`` is one of the rings of keys and values."""
    buffers = context.buffers
    rings = buffers.rings._replace(kv=buffers.rings.kv[index])
    return dataclasses.replace(context, buffers=buffers._replace(rings=rings))


def kv_of_slot(context: DecodeContext, slot: Int):
    """[heads_per_page, rows, packing, lanes] of a slot of the context's ring."""
    slots = context.phase.slots_per_kv_ring
    if context.phase.num_kv_rings > 1:
        slot = jnp.where(slot >= slots, slot - slots, slot)
    return context.rings.kv.at[slot]


def hold_copies_back(context: DecodeContext, result: jax.Array) -> None:
    """Keeps copies into the context's ring that are started later behind ``result``.

    The compiler knows no reason to start a copy early, and does it after all vector
    work. But it keeps copies between two stores to the same array in their order. So
    the result is stored in rows of the ring that hold nothing.

    Args:
      context: Has the ring.
      result: f32[8 or more, 128].
    """
    config, kv = context.config, context.rings.kv
    words = pltpu.bitcast(result[:SUBLANES], jnp.uint32)
    words = jnp.concatenate([words] * max(config.cache.lanes // LANES, 1), axis=1)
    unused = kv.at[0, 0, pl.ds(kv.shape[2] - SUBLANES, SUBLANES)]
    rows = tile_io.WordRows(unused, config.interpret)
    rows.store(words[:, : config.cache.lanes], 0)


def row_factors(config: KernelConfig) -> list[str]:
    """Names of the factors of ``Buffers.row_factors``."""
    names = {factor.name for factor in config.numerics.head_factors}
    return [name for name in ROW_FACTORS if name in names]


def shapes(config: KernelConfig, phase: PhaseConfig) -> Buffers:
    """``Shaped`` in the place of each buffer, or None."""
    queries, out, lse = config.query_layout, config.out_layout, config.lse_layout
    cache, slots, cells = config.cache, phase.num_slots, phase.cells_per_step
    query_rows, tokens = config.query_rows(phase), tokens_per_step(phase)
    # Cells without a query have their place behind those of the others.
    places = tokens + phase.block_q
    # Whole chunks are loaded from any of the new tokens.
    num_new = places + 2 * new_tokens_margin(config, phase)
    updates = config.spec.update_kv_cache
    ring = new_tokens.ring_shape(config, slots, num_new) if updates else None
    word_rows = queries.buffer_rows
    if phase.block_q == 1:
        # Whole registers are loaded from the first word of any key head.
        word_rows += (query_rows + SUBLANES) * queries.columns
    schedule = Schedule(config, phase)
    num_softmax_tiles = config.num_kv_heads // config.heads_per_softmax_tile(phase)
    state = num_softmax_tiles, query_rows
    num_factors = len(row_factors(config))
    kv_rows = cells * schedule.cell_rows + (SUBLANES if phase.num_kv_rings > 1 else 0)
    kv = Shaped(
        (
            phase.slots_per_kv_ring,
            cache.heads_per_page,
            kv_rows,
            cache.packing,
            cache.lanes,
        ),
        cache.dtype,
    )
    return Buffers(
        rings=refs.Rings(
            queries=Shaped(
                (slots, places, word_rows, queries.packing, queries.row_lanes),
                queries.dtype,
            ),
            keys=ring,
            values=ring,
            kv=(kv,) * phase.num_kv_rings,
            out=Shaped(
                (
                    slots,
                    places,
                    out.buffer_rows,
                    out.packing,
                    out.row_lanes,
                ),
                out.dtype,
            ),
            lse=(
                Shaped(
                    (slots, places, lse.buffer_rows, lse.packing, lse.row_lanes),
                    lse.dtype,
                )
                if config.spec.return_lse
                else None
            ),
        ),
        sinks=Shaped((*state, LANES), jnp.float32) if config.spec.has_sinks else None,
        row_factors=(
            Shaped((num_factors, *state, LANES), jnp.float32) if num_factors else None
        ),
        state=None if schedule.cell_is_window else _state_shapes(config, state),
    )


def _state_shapes(config: KernelConfig, shape: tuple[int, int]) -> Any:
    """``Shaped`` in the place of each array of a state, [softmax tiles, query rows]."""
    widths = LANES, LANES, config.lanes  # of m, l and acc
    return SoftmaxState._make(Shaped((*shape, width), jnp.float32) for width in widths)


def new_tokens_margin(config: KernelConfig, phase: PhaseConfig) -> int:
    """Tokens before the first one of the rings of new tokens, and after the last.

    One new token is laid into its chunk by itself. Several are loaded as a chunk, in
    which other tokens may be before them and after them.
    """
    return 0 if phase.block_q == 1 else config.tokens_per_chunk


def allocate(
    config: KernelConfig, phase: PhaseConfig
) -> tuple[Buffers, refs.Bookkeeping, refs.Semaphores]:
    """Scratch types of the phase."""
    numbers_per_step = step_structure(Schedule(config, phase)).num_leaves
    return (
        refs.allocate_buffers(shapes(config, phase)),
        refs.allocate_bookkeeping(phase, phase.num_slots * numbers_per_step),
        refs.allocate_semaphores(phase),
    )

"""VMEM and SMEM of prefill and mixed."""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jax_kernels.ragged_paged_attention.config import KernelConfig, PhaseConfig
from jax_kernels.ragged_paged_attention.kernel import new_tokens, refs
from jax_kernels.ragged_paged_attention.kernel.phase import PhaseContext
from jax_kernels.ragged_paged_attention.kernel.refs import Shaped
from jax_kernels.ragged_paged_attention.kernel.schedule import EMPTY_CELL
from jax_kernels.ragged_paged_attention.layout import LANES
from jax_kernels.ragged_paged_attention.token_layout import TokenRows

# Fetched queries, new tokens and outputs: each is used up before the next is needed.
ONLY_SLOT = 0

# How the numbers of a cell are noted.
CELL_STRUCTURE = jax.tree.structure(EMPTY_CELL)


class Buffers(NamedTuple):
    """VMEM; a slot of ``rings.kv`` holds the block of one cell."""

    rings: refs.Rings
    seam: Any  # [heads_per_page, 1, packing, lanes]: the row of old and new tokens
    q: Any  # [Hkv, query rows, lanes]: multiplied and cast
    m: Any  # f32[1, Hkv, query rows, 128]
    l: Any  # noqa: E741  f32[1, Hkv, query rows, 128]
    acc: Any  # f32[1, Hkv, query rows, lanes]
    waiting: Any  # f32[chunks of a block, rows, tokens]: scores of a softmax tile, or
    # None with float8 probabilities
    visible: Any  # u32[block_q // packing, tokens of a chunk]: bits that take part
    pending_l: Any  # like ``l``, with float8 probabilities: see float8.py
    pending_acc: Any  # like ``acc``


TileContext: TypeAlias = PhaseContext[Buffers]


def chunk_tokens(phase: PhaseConfig) -> int:
    """Tokens of a block that are computed at once where it needs a mask."""
    return min(phase.chunk_kv, phase.block_kv)


def new_token_capacity(config: KernelConfig, phase: PhaseConfig) -> int:
    """Tokens that there is room for in ``keys`` and in ``values``.

    A tile brings block_q new tokens to a block, and up to twice as many of earlier
    tiles whose writes have not been seen to end. More of them, as there are without a
    causal mask, come in pieces if rows are wide and so dear to keep.
    """
    if config.lanes <= LANES:
        return phase.block_kv
    return min(phase.block_kv, 3 * phase.block_q)


def shapes(config: KernelConfig, phase: PhaseConfig) -> Buffers:
    """``Shaped`` in the place of each buffer, or None."""
    cache, slots = config.cache, phase.num_io_slots
    updates = config.spec.update_kv_cache

    def tokens(layout: TokenRows) -> Shaped:
        rows = layout.buffer_rows, layout.packing, layout.row_lanes
        return Shaped((slots, phase.block_q, *rows), layout.dtype)

    capacity = new_token_capacity(config, phase)
    ring = new_tokens.ring_shape(config, slots, capacity) if updates else None
    block = (
        cache.heads_per_page,
        phase.block_kv // cache.packing,
        cache.packing,
        cache.lanes,
    )
    state = config.num_kv_heads, config.query_rows(phase)
    chunk = chunk_tokens(phase)
    waiting = phase.block_kv // chunk, config.softmax_rows(phase), chunk
    visible = phase.block_q // config.numerics.masked_packing, chunk
    sums = Shaped((1, *state, LANES), jnp.float32)
    accumulator = Shaped((1, *state, config.lanes), jnp.float32)
    has_pending = config.numerics.float8_probabilities is not None
    return Buffers(
        rings=refs.Rings(
            queries=tokens(config.query_layout),
            keys=ring,
            values=ring,
            kv=Shaped((phase.num_slots, *block), cache.dtype),
            out=tokens(config.out_layout),
            lse=tokens(config.lse_layout) if config.spec.return_lse else None,
        ),
        seam=(
            Shaped((cache.heads_per_page, 1, cache.packing, cache.lanes), cache.dtype)
            if updates
            else None
        ),
        q=Shaped((*state, config.lanes), config.numerics.multiply_dtype),
        m=Shaped((1, *state, LANES), jnp.float32),
        l=sums,
        acc=accumulator,
        waiting=None if has_pending else Shaped(waiting, jnp.float32),
        visible=(None if config.spec.hides_first_keys else Shaped(visible, jnp.uint32)),
        pending_l=sums if has_pending else None,
        pending_acc=accumulator if has_pending else None,
    )


def allocate(
    config: KernelConfig, phase: PhaseConfig
) -> tuple[Buffers, refs.Bookkeeping, refs.Semaphores]:
    """Scratch types of the phase."""
    num_noted_cells = phase.num_slots + 1  # and the planned one
    return (
        refs.allocate_buffers(shapes(config, phase)),
        refs.allocate_bookkeeping(phase, num_noted_cells * CELL_STRUCTURE.num_leaves),
        refs.allocate_semaphores(phase),
    )

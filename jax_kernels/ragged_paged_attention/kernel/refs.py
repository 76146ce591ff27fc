"""The kernel's references in groups, and beside each what allocates it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.config import (
    SUBLANES,
    KernelConfig,
    PhaseConfig,
)
from jax_kernels.ragged_paged_attention.kernel import tile_io
from jax_kernels.ragged_paged_attention.kernel.decode.steps import step_structure
from jax_kernels.ragged_paged_attention.kernel.schedule import Cell
from jax_kernels.ragged_paged_attention.layout import LANES, dtype_packing

# Rows of the zero buffer that clears the padded end of the output.
ZERO_ROWS = 32
# In prefill and mixed, prepared queries: of the present cell and of the following one.
NUM_QUERY_SLOTS = 2
# There, fetched queries, new tokens and outputs: each is used up before the next is
# needed.
ONLY_SLOT = 0


class ScalarRefs(NamedTuple):
    """Lengths and page table, in SMEM."""

    kv_lens: Any  # i32[S]
    page_indices: Any  # i32[S * P]
    cu_q_lens: Any  # i32[S + 1]
    distribution: Any  # i32[3]


class HbmInputs(NamedTuple):
    """Arrays in HBM; ``packing`` is that of their own dtype."""

    queries: Any  # [T, Hq / packing, packing, io_lanes]
    keys: Any  # [T, Hkv / packing, packing, io_lanes], or None
    values: Any  # the same
    kv_cache: Any  # CacheLayout.shape; the output is the same memory
    sinks: Any  # f32[Hq] in SMEM, or None


class HbmOutputs(NamedTuple):
    """Arrays in HBM."""

    out: Any  # [T, Hq / packing, packing, io_lanes]
    kv_cache: Any  # CacheLayout.shape, or None when nothing is written


class Buffers(NamedTuple):
    """VMEM of one phase: the rings that DMAs fill and drain, and the state.

    A slot holds one step: one cell of prefill or mixed, some cells of decode. There,
    ``tokens`` is a token for each cell, and one more in ``out``, which is never sent;
    otherwise it is block_q.
    """

    queries: Any  # [tile slots, tokens, word rows, packing, io_lanes]
    keys: Any  # [new-token slots, tokens, word rows, packing, io_lanes], or None
    values: Any  # the same
    kv: Any  # [slots, heads_per_page, cells * block rows, packing, lanes]
    out: Any  # [tile slots, tokens, word rows, packing, io_lanes]
    scores: Any  # f32[softmax rows, block_kv]: of the next tile; None in decode
    seam: Any  # [heads_per_page, 1, packing, lanes]: the row of old and new tokens
    q: Any  # [2, Hkv, query rows, lanes]: multiplied and cast; None in decode
    sinks: Any  # f32[tiles, query rows, 128], or None: where rows start in decode
    # One tile for each key head; some key heads share one in decode.
    m: Any  # f32[1, tiles, query rows, 128]
    l: Any  # noqa: E741  f32[1, tiles, query rows, 128]
    acc: Any  # f32[1, tiles, query rows, lanes]


class Bookkeeping(NamedTuple):
    """SMEM of one phase."""

    notes: Any  # i32[numbers]: the cells or steps in flight
    written_rows: Any  # i32[slots]: cache rows being written back from a slot
    out_tokens: Any  # i32[tile slots]: output rows being written from a slot


class Semaphores(NamedTuple):
    """DMA semaphores of one phase, one per slot of each ring."""

    kv: Any
    new_kv: Any
    queries: Any
    write_back: Any
    out: Any


def new_token_rows(config: KernelConfig, phase: PhaseConfig) -> int:
    """Tokens that a slot holds of ``keys`` and of ``values``.

    A tile brings block_q new tokens to a block, and up to twice as many of earlier
    tiles whose writes have not been seen to end. More of them come in pieces, as they
    do in wide rows, which are dear to keep.
    """
    if phase.is_decode:
        return phase.cells_per_step
    if config.lanes <= LANES:
        return phase.block_kv
    return min(phase.block_kv, 2 * phase.block_q)


def _query_word_rows(config: KernelConfig, phase: PhaseConfig) -> int:
    rows = tile_io.io_word_rows(config.num_q_heads, dtype_packing(config.io_dtype))
    # Decode loads whole registers from the first word row of any key head.
    return rows + config.query_rows(phase) + SUBLANES if phase.is_decode else rows


def buffer_shapes(config: KernelConfig, phase: PhaseConfig) -> Buffers:
    """Shapes and dtypes of ``Buffers``, as (shape, dtype) pairs or None."""
    io_packing = dtype_packing(config.io_dtype)
    out_packing = dtype_packing(config.out_dtype)
    cache, lanes, slots = config.cache, config.lanes, phase.num_slots
    new_kv = (
        (
            phase.num_new_token_slots,
            new_token_rows(config, phase),
            tile_io.io_word_rows(config.num_kv_heads, io_packing),
            io_packing,
            config.io_lanes,
        ),
        config.io_dtype,
    )
    updates = config.spec.update_kv_cache
    state = (
        1,
        config.num_kv_heads // config.heads_per_tile(phase),
        config.query_rows(phase),
    )
    tokens = phase.cells_per_step if phase.is_decode else phase.block_q
    return Buffers(
        queries=(
            (
                phase.num_tile_slots,
                tokens,
                _query_word_rows(config, phase),
                io_packing,
                config.io_lanes,
            ),
            config.io_dtype,
        ),
        keys=new_kv if updates else None,
        values=new_kv if updates else None,
        kv=(
            (
                slots,
                cache.heads_per_page,
                phase.cells_per_step * phase.block_kv // cache.packing,
                cache.packing,
                lanes,
            ),
            cache.dtype,
        ),
        out=(
            (
                phase.num_tile_slots,
                tokens + 1 if phase.is_decode else tokens,
                tile_io.io_word_rows(config.num_q_heads, out_packing),
                out_packing,
                config.io_lanes,
            ),
            config.out_dtype,
        ),
        scores=(
            None
            if phase.is_decode
            else ((config.softmax_rows(phase), phase.block_kv), jnp.float32)
        ),
        seam=(
            ((cache.heads_per_page, 1, cache.packing, lanes), cache.dtype)
            if updates and not phase.is_decode
            else None
        ),
        q=(
            None
            if phase.is_decode
            else ((NUM_QUERY_SLOTS, *state[1:], lanes), config.multiply_dtype)
        ),
        sinks=(
            ((*state[1:], LANES), jnp.float32)
            if config.spec.has_sinks and phase.is_decode
            else None
        ),
        m=((*state, LANES), jnp.float32),
        l=((*state, LANES), jnp.float32),
        acc=((*state, lanes), jnp.float32),
    )


def allocate_phase(config: KernelConfig, phase: PhaseConfig):
    """Scratch types of one phase: ``(Buffers, Bookkeeping, Semaphores)``."""
    buffers = Buffers(
        *(
            None if entry is None else pltpu.VMEM(*entry)
            for entry in buffer_shapes(config, phase)
        )
    )
    slots = phase.num_slots
    if phase.is_decode:
        note_size = slots * step_structure(phase.cells_per_step).num_leaves
    else:
        note_size = (slots + 1) * len(Cell._fields)  # and the planned one
    bookkeeping = Bookkeeping(
        notes=pltpu.SMEM((note_size,), jnp.int32),
        written_rows=pltpu.SMEM((slots,), jnp.int32),
        out_tokens=pltpu.SMEM((phase.num_tile_slots,), jnp.int32),
    )
    semaphores = Semaphores(
        *(pltpu.SemaphoreType.DMA((slots,)) for _ in Semaphores._fields)
    )
    return buffers, bookkeeping, semaphores


def zero_rows_shape(config: KernelConfig) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of the zeros that clear the padded end of the output."""
    packing = dtype_packing(config.out_dtype)
    return (
        (ZERO_ROWS, config.num_q_heads // packing, packing, config.io_lanes),
        config.out_dtype,
    )

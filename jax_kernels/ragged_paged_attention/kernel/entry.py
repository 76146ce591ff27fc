"""The Pallas kernel: one launch that runs a specialised loop for each phase.

Every step of a loop does, for one cell (schedule.py):

    issue    start the DMAs of the cell ``lookahead`` steps ahead
    wait     for this cell's pages, queries and new tokens
    merge    new keys and values into the block
    write    the changed rows back to their pages (awaited when the slot is reused)
    attend   scores, softmax, values
    finish   after the last block of a tile: normalise, send the output
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_kernels.ragged_paged_attention.config import (
    KernelConfig,
    Phase,
    PhaseConfig,
)
from jax_kernels.ragged_paged_attention.kernel import refs
from jax_kernels.ragged_paged_attention.kernel.decode import loop as decode_loop
from jax_kernels.ragged_paged_attention.kernel.phase import (
    Copies,
    OutputClearer,
    StepCopies,
)
from jax_kernels.ragged_paged_attention.kernel.schedule import EMPTY_CELL, Int, Schedule
from jax_kernels.ragged_paged_attention.kernel.tiles import compute as tiles
from jax_kernels.ragged_paged_attention.kernel.tiles.fetch import Fetcher, store_cell


def rpa_kernel(
    scalars: refs.ScalarRefs,
    inputs: refs.HbmInputs,
    outputs: refs.HbmOutputs,
    zeros,  # VMEM, refs.zero_rows_shape
    clear_semaphore,
    *,
    config: KernelConfig,
) -> None:
    """Runs every phase, and clears the rows of the output that no sequence owns."""
    num_live = scalars.distribution[2]
    num_live_tokens = jnp.where(num_live > 0, scalars.cu_q_lens[num_live], 0)
    clearer = OutputClearer(config, outputs.out, zeros, clear_semaphore)

    def clear() -> None:
        @pl.when(num_live_tokens < config.num_tokens)
        def _():
            zeros[...] = jnp.zeros(zeros.shape, zeros.dtype)
            clearer.start(num_live_tokens)

    is_first = jnp.bool(True)
    for phase in config.phases:
        begin, end = _sequences_of(phase, scalars, config)
        # The first fetches must not queue behind the zeros of many rows.
        run = functools.partial(
            _run_phase,
            begin,
            end,
            functools.partial(pl.when(is_first), clear),
            scalars,
            inputs,
            outputs,
            Schedule(config, phase),
        )

        @pl.when(end > begin)
        def _(run=run, phase=phase):
            pl.run_scoped(run, *refs.allocate_phase(config, phase))

        is_first &= end <= begin

    pl.when(is_first)(clear)
    clearer.wait(num_live_tokens)


def _sequences_of(phase: PhaseConfig, scalars, config: KernelConfig):
    """The range of sequences that a phase serves."""
    decode_end, prefill_end, num_live = (scalars.distribution[i] for i in range(3))
    if phase.phase is Phase.DECODE:
        return 0, decode_end
    if phase.phase is Phase.PREFILL:
        return decode_end, prefill_end
    has_prefill = any(other.phase is Phase.PREFILL for other in config.phases)
    # Without a loop of its own, the prefill range is served as mixed.
    return (prefill_end if has_prefill else decode_end), num_live


def _run_phase(
    begin,
    end,
    after_first_fetches,
    scalars,
    inputs,
    outputs,
    schedule,
    buffers,
    bookkeeping,
    semaphores,
):
    """The pipelined loop over the cells of sequences begin .. end."""
    operands = (
        schedule,
        scalars,
        inputs,
        outputs,
        buffers,
        bookkeeping,
        semaphores,
    )
    if schedule.phase.is_decode:
        decode_loop.run(StepCopies(*operands), begin, end, after_first_fetches)
    else:
        _run_tiles(Copies(*operands), begin, end, after_first_fetches)


def _run_tiles(
    copies: Copies, begin: Int, end: Int, after_first_fetches: Callable[[], None]
) -> None:
    """The loop of prefill and mixed: a cell is computed while the next is received.

    It begins one step early, at an empty cell, and so receives the first.
    """
    copies.reset()
    fetcher = Fetcher(copies, end)

    def is_unfinished(carry):
        num_done, _, progress = carry
        return num_done < progress.num_cells

    def run_step(carry):
        num_done, here, progress = carry
        following, progress = tiles.process(
            copies,
            here,
            has_following=num_done + 1 < progress.num_cells,
            start_queries=functools.partial(fetcher.start_queries, progress),
            start=functools.partial(fetcher.start, progress),
            plan=functools.partial(fetcher.plan, progress),
            when_empty=functools.partial(pl.when(num_done < 0), after_first_fetches),
        )
        return num_done + 1, following, progress

    last_slot = jnp.int32(copies.schedule.phase.num_slots - 1)
    store_cell(copies.bookkeeping.notes, last_slot, EMPTY_CELL)
    here = tiles.Place(slot=last_slot, query_slot=jnp.int32(0))
    progress = fetcher.begin(begin)
    fetcher.start_queries(progress)
    fetcher.start(progress)
    progress = fetcher.plan(progress)
    lax.while_loop(is_unfinished, run_step, (jnp.int32(-1), here, progress))
    copies.drain()

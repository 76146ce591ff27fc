"""The loop of decode: a step is computed while the next ones are fetched."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from jax_kernels.ragged_paged_attention.kernel import notes
from jax_kernels.ragged_paged_attention.kernel.decode import compute, new_tokens
from jax_kernels.ragged_paged_attention.kernel.decode.buffers import (
    DecodeContext,
    allocate,
)
from jax_kernels.ragged_paged_attention.kernel.decode.copies import StepCopies
from jax_kernels.ragged_paged_attention.kernel.decode.fetch import (
    Fetcher,
    Progress,
    load_step,
)
from jax_kernels.ragged_paged_attention.kernel.schedule import Int, next_slot

__all__ = ["allocate", "run"]


def run(
    context: DecodeContext,
    begin: Int,
    end: Int,
    after_first_fetches: Callable[[], None],
) -> None:
    """Computes the sequences begin .. end; at least one."""
    notes.forget_writes(context.bookkeeping)
    copies, phase = StepCopies(context), context.phase
    fetcher = Fetcher(context, copies, end)
    progress = lax.fori_loop(
        0,
        phase.lookahead,
        lambda _, progress: fetcher.start(fetcher.plan(progress)),
        fetcher.begin(begin),
    )
    after_first_fetches()
    compute.lay_out_sinks(context)
    progress = fetcher.plan(progress)

    def is_unfinished(carry):
        num_done, _, progress = carry
        return num_done < progress.num_started

    def run_step(carry):
        num_done, slot, progress = carry
        progress = _process(context, copies, fetcher, slot, progress)
        return num_done + 1, next_slot(slot, phase.num_slots), progress

    zero = jnp.int32(0)
    lax.while_loop(is_unfinished, run_step, (zero, zero, progress))
    copies.wait_all_writes()


def _process(
    context: DecodeContext,
    copies: StepCopies,
    fetcher: Fetcher,
    slot: Int,
    progress: Progress,
) -> Progress:
    """Starts the planned step and computes the one in a slot, planning on the way."""
    progress = fetcher.start(progress)
    step = load_step(context, slot)
    copies.wait(step, slot)
    if context.updates and context.phase.block_q > 1:
        for index in range(len(step.cells)):
            new_tokens.merge_several(context, step, slot, index)
    progress = compute.attend(
        context, step, slot, functools.partial(fetcher.plan, progress)
    )
    if context.updates:
        copies.start_write_back(step, slot)
    copies.start_outputs(step, slot)
    return progress

"""The loop of decode: a step is computed while the next ones are fetched."""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax

from jax_kernels.ragged_paged_attention.kernel import notes
from jax_kernels.ragged_paged_attention.kernel.decode import compute, new_tokens
from jax_kernels.ragged_paged_attention.kernel.decode.buffers import (
    DecodeContext,
    allocate,
    with_kv_ring,
)
from jax_kernels.ragged_paged_attention.kernel.decode.copies import StepCopies
from jax_kernels.ragged_paged_attention.kernel.decode.fetch import (
    Fetcher,
    PlannedPages,
    Progress,
    Shadow,
    load_step,
)
from jax_kernels.ragged_paged_attention.kernel.decode.steps import Step
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
    phase = context.phase
    contexts = [with_kv_ring(context, ring) for ring in range(phase.num_kv_rings)]
    fetcher = Fetcher(contexts[0], StepCopies(contexts[0]), end)
    progress = lax.fori_loop(
        0,
        phase.lookahead,
        lambda _, progress: fetcher.start(fetcher.plan(progress), with_pages=True),
        fetcher.begin(begin),
    )
    after_first_fetches()
    compute.lay_out_sinks(context)
    compute.lay_out_factors(context)
    progress = fetcher.plan(progress)

    def is_unfinished(carry):
        num_done, _, progress = carry
        return num_done < progress.num_started

    def run_step(carry):
        num_done, slot, progress = carry
        progress = _process(contexts, fetcher, slot, progress)
        return num_done + 1, next_slot(slot, phase.num_slots), progress

    zero = jnp.int32(0)
    lax.while_loop(is_unfinished, run_step, (zero, zero, progress))
    fetcher.copies.wait_all_writes()


def _process(
    contexts: Sequence[DecodeContext], fetcher: Fetcher, slot: Int, progress: Progress
) -> Progress:
    """Starts the planned step and computes the one in a slot, planning on the way.

    Args:
      contexts: With each of the rings of keys and values.
      fetcher: Knows what is next.
      slot: Of the step to compute.
      progress: How far the fetcher is.
    """
    planned_slot, copies = progress.slot, fetcher.copies
    progress = fetcher.start(progress, with_pages=len(contexts) == 1)
    step = load_step(fetcher.context, slot)
    copies.wait(step, slot)
    plan = functools.partial(fetcher.plan, progress)
    if len(contexts) == 1:
        progress = _compute(contexts[0], step, slot, Shadow(plan))
    else:
        # Read now, since a plan must not be noted before all of this one is read.
        planned = load_step(fetcher.context, planned_slot)
        progress = lax.cond(
            slot < fetcher.context.phase.slots_per_kv_ring,
            *(
                functools.partial(
                    _compute,
                    computing,
                    step,
                    slot,
                    Shadow(
                        plan, PlannedPages(StepCopies(filling), planned, planned_slot)
                    ),
                )
                for computing, filling in (contexts, contexts[::-1])
            ),
        )
    copies.start_outputs(step, slot)
    return progress


def _compute(context: DecodeContext, step: Step, slot: Int, shadow: Shadow) -> Progress:
    """Computes a step and writes its new tokens back."""
    if context.updates and context.phase.block_q > 1:
        for index in range(len(step.cells)):
            new_tokens.merge_several(context, step, slot, index)
    progress = compute.attend(context, step, slot, shadow)
    if context.updates:
        StepCopies(context).start_write_back(step, slot)
    return progress

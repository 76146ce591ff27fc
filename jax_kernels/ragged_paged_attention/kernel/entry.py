"""The Pallas kernel: one launch that runs a specialised loop for each phase.

The two loops, decode/ and tiles/, are the same design. Every step of a loop does, for
one cell (schedule.py) or, in decode, for some cells:

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

from jax_kernels.ragged_paged_attention import jax_versions
from jax_kernels.ragged_paged_attention.config import (
    KernelConfig,
    Phase,
    PhaseConfig,
)
from jax_kernels.ragged_paged_attention.kernel import refs
from jax_kernels.ragged_paged_attention.kernel.decode import loop as decode_loop
from jax_kernels.ragged_paged_attention.kernel.padding import (
    ClearScratch,
    OutputClearer,
)
from jax_kernels.ragged_paged_attention.kernel.phase import PhaseContext
from jax_kernels.ragged_paged_attention.kernel.schedule import Int, Schedule
from jax_kernels.ragged_paged_attention.kernel.tiles import loop as tiles_loop


def rpa_kernel(
    scalars: refs.ScalarRefs,
    inputs: refs.Inputs,
    outputs: refs.Outputs,
    scratch: ClearScratch,
    *,
    config: KernelConfig,
) -> None:
    """Runs every phase, and clears the tokens of the outputs that no sequence owns."""
    num_live = scalars.distribution[2]
    num_live_tokens = jnp.where(num_live > 0, scalars.cu_q_lens[num_live], 0)
    clearer = OutputClearer(config.num_tokens, outputs, scratch)

    def clear() -> None:
        @pl.when(num_live_tokens < config.num_tokens)
        def _():
            clearer.start(num_live_tokens)

    def run(*_) -> None:
        _run_phases(scalars, inputs, outputs, config, clear)
        clearer.wait(num_live_tokens)

    if not _surely_fits_instruction_memory(config):
        run()
        return
    # A loop that runs once. The compiler cuts a program into pieces, each of which is
    # fetched when it is come to, but leaves loops whole if they fit: so the program
    # comes at once, and a call does not wait again behind a phase without sequences.
    num_runs = jnp.where(num_live >= 0, 1, 0)
    lax.fori_loop(0, num_runs, run, None)


def _surely_fits_instruction_memory(config: KernelConfig) -> bool:
    """Whether the code of all phases together does.

    A loop that does not is cut anywhere, and then the loops in it may be fetched again
    in every iteration. Products in float32 or of heads wider than a matrix unit, and
    two loops of tiles, may be too long together.
    """
    is_float32 = config.numerics.value_dtype == jnp.float32
    is_wide = config.lanes > config.chip.matrix_columns
    num_tile_loops = sum(not phase.is_decode for phase in config.phases)
    return not (is_float32 or is_wide or num_tile_loops > 1)


def _run_phases(
    scalars: refs.ScalarRefs,
    inputs: refs.Inputs,
    outputs: refs.Outputs,
    config: KernelConfig,
    clear: Callable[[], None],
) -> None:
    """Runs the loop of each phase that has sequences.

    Args:
      scalars: Lengths, page table and distribution.
      inputs: Of the kernel.
      outputs: Of the kernel.
      config: Of the kernel.
      clear: What to do once: after the first fetches, or if there is no sequence.
    """
    is_first = jnp.bool(True)
    for phase in config.phases:
        begin, end = _sequences_of(phase, scalars, config)
        loop = decode_loop if phase.is_decode else tiles_loop
        # The first fetches must not queue behind the zeros of many tokens.
        run = functools.partial(
            _run_phase,
            loop.run,
            begin,
            end,
            functools.partial(pl.when(is_first), clear),
            functools.partial(
                PhaseContext, Schedule(config, phase), scalars, inputs, outputs
            ),
        )

        @pl.when(end > begin)
        def _(run=run, loop=loop, phase=phase):
            with jax_versions.device_named(config.chip.device_kind):
                pl.run_scoped(run, *loop.allocate(config, phase))

        is_first &= end <= begin

    pl.when(is_first)(clear)


def _sequences_of(phase: PhaseConfig, scalars, config: KernelConfig):
    """The range of sequences that a phase serves."""
    decode_end, prefill_end, num_live = (scalars.distribution[i] for i in range(3))
    if phase.phase in (Phase.DECODE, Phase.DECODE_TILES):
        return 0, decode_end
    if phase.phase is Phase.PREFILL:
        return decode_end, prefill_end
    has_prefill = any(other.phase is Phase.PREFILL for other in config.phases)
    # Without a loop of its own, the prefill range is served as mixed.
    return (prefill_end if has_prefill else decode_end), num_live


def _run_phase(
    loop: Callable[..., None],
    begin: Int,
    end: Int,
    after_first_fetches: Callable[[], None],
    make_context: Callable[..., PhaseContext],
    buffers,
    bookkeeping: refs.Bookkeeping,
    semaphores: refs.Semaphores,
) -> None:
    """The loop over the cells of sequences begin .. end."""
    context = make_context(buffers, bookkeeping, semaphores)
    loop(context, begin, end, after_first_fetches)

"""Copies of decode."""

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.kernel.copies import (
    PhaseCopies,
    new_tokens,
    pages_of,
    some_tokens,
)
from jax_kernels.ragged_paged_attention.kernel.decode.buffers import (
    Buffers,
    DecodeContext,
    kv_of_slot,
    new_tokens_margin,
)
from jax_kernels.ragged_paged_attention.kernel.decode.steps import Step, new_end
from jax_kernels.ragged_paged_attention.kernel.pages import wait_for
from jax_kernels.ragged_paged_attention.kernel.schedule import (
    Int,
    ceil_to,
    log2,
)


class StepCopies(PhaseCopies[Buffers]):
    """Starts the copies of steps and waits for them."""

    def start_tokens(self, step: Step, slot: Int) -> None:
        """Fetches the queries and the new tokens of a step.

        Its sequences follow each other in the flat arrays, so their queries, new keys
        and new values are one range each.
        """

        @pl.when(step.num_tokens > 0)
        def _():
            for source, target, semaphores in _tokens(self.context, step, slot):
                pltpu.make_async_copy(source, target, semaphores.at[slot]).start()

    def start_pages(
        self, step: Step, slot: Int, index: int, *, unrolled: bool = False
    ) -> None:
        """Fetches the pages of the cell ``index`` of a step.

        Unrolled, this is code without branches.
        """
        cell = step.cells[index]
        pages_of(self.context).start_fetch(
            cell.place,
            0 if cell.row_begin is None else cell.row_begin,
            cell.row_end,
            _block(self.context, slot, index),
            self.context.semaphores.kv.at[slot],
            unrolled=unrolled,
        )

    def wait(self, step: Step, slot: Int) -> None:
        """Waits for all that is fetched for a step."""

        @pl.when(step.num_tokens > 0)
        def _():
            for _, target, semaphores in _tokens(self.context, step, slot):
                wait_for(target, semaphores.at[slot])

        self.wait_rows(slot, step.num_rows, self.context.semaphores.kv)

    def start_write_back(self, step: Step, slot: Int) -> None:
        """Writes the rows that hold new tokens to their pages."""
        context = self.context
        packing = context.config.cache.packing
        for index, cell in enumerate(step.cells):

            @pl.when(cell.new_place >= 0)
            def _(index=index, cell=cell):
                block = _block(context, slot, index)
                semaphore = context.semaphores.write_back.at[slot]
                row = cell.new_place >> log2(packing)
                if context.phase.block_q == 1:
                    pages_of(context).start_write_row(cell.place, row, block, semaphore)
                    return
                end = ceil_to(new_end(context.phase, cell), packing) >> log2(packing)
                pages_of(context).start_write(cell.place, row, end, block, semaphore)

        context.bookkeeping.written_rows[slot] = step.num_written

    def start_outputs(self, step: Step, slot: Int) -> None:
        """Sends the outputs of the sequences that end in a step."""

        @pl.when(step.num_ended > 0)
        def _():
            self.start_output(slot, step.first_token, step.num_ended)


def _block(context: DecodeContext, slot: Int, index: int):
    """The block of the cell ``index`` of a step."""
    rows = context.schedule.cell_rows
    return kv_of_slot(context, slot).at[:, pl.ds(index * rows, rows)]


def _tokens(context: DecodeContext, step: Step, slot: Int):
    """The tokens that a step fetches: whence, where to, and with which semaphores."""
    semaphores, source = context.semaphores, context.inputs.queries
    first, num_tokens = step.first_token, step.num_tokens
    queries = (
        source.at[pl.ds(first, num_tokens)],
        some_tokens(context.rings.queries.at[slot], 0, num_tokens, source.shape[1]),
        semaphores.queries,
    )
    if not context.updates:
        return [queries]
    origin = first - new_tokens_margin(context.config, context.phase)
    pairs = new_tokens(context, slot, origin, first, num_tokens)
    return [queries, *((*pair, semaphores.new_kv) for pair in pairs)]

"""Copies between HBM and VMEM that both loops have, with their waits.

Every slot of a ring has a semaphore per kind of copy. A wait names the amount, not the
copies: it asks for as many bytes as were started.
"""

import dataclasses
from typing import Generic

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.kernel.pages import Pages, wait_for
from jax_kernels.ragged_paged_attention.kernel.phase import BuffersT, PhaseContext
from jax_kernels.ragged_paged_attention.kernel.schedule import Int, log2
from jax_kernels.ragged_paged_attention.token_layout import TokenRows


@dataclasses.dataclass(frozen=True)
class PhaseCopies(Generic[BuffersT]):
    """Starts copies of a phase and waits for them."""

    context: PhaseContext[BuffersT]

    def wait_rows(self, slot: Int, num_rows: Int, semaphores) -> None:
        """Waits for packed rows that move into or out of a slot of ``rings.kv``."""

        @pl.when(num_rows > 0)
        def _():
            rows = self.context.rings.kv.at[0, :, pl.ds(0, num_rows)]
            wait_for(rows, semaphores.at[slot])

    def wait_write_back(self, slot: Int) -> None:
        """Waits until what is written back from a slot has landed."""
        written_rows = self.context.bookkeeping.written_rows
        num_rows = written_rows[slot]
        self.wait_rows(slot, num_rows, self.context.semaphores.write_back)
        written_rows[slot] = 0

    def start_output(self, slot: Int, first_token: Int, num_tokens: Int) -> None:
        """Sends the first tokens of the output buffers to HBM."""
        context = self.context
        for source, output in _output_tokens(context, slot, num_tokens):
            pltpu.make_async_copy(
                source,
                output.at[pl.ds(first_token, num_tokens)],
                context.semaphores.out.at[slot],
            ).start()
        context.bookkeeping.out_tokens[slot] = num_tokens

    def wait_output(self, slot: Int) -> None:
        """Waits until the output buffers may be filled again."""
        context = self.context
        num_tokens = context.bookkeeping.out_tokens[slot]

        @pl.when(num_tokens > 0)
        def _():
            for tokens, _ in _output_tokens(context, slot, num_tokens):
                wait_for(tokens, context.semaphores.out.at[slot])

        context.bookkeeping.out_tokens[slot] = 0

    def wait_all_writes(self) -> None:
        """Waits for every write of the phase."""
        if self.context.updates:
            for slot in range(self.context.phase.num_slots):
                self.wait_write_back(jnp.int32(slot))
        for slot in range(self.context.phase.num_io_slots):
            self.wait_output(jnp.int32(slot))


def pages_of(context: PhaseContext) -> Pages:
    """The pages of the cache."""
    # The output is the same memory as the input. Reading through the output keeps
    # reads and writes of one array in one name.
    arrays = context.outputs if context.updates else context.inputs
    return Pages(context.schedule, context.scalars.page_indices, arrays.kv_cache)


def new_tokens(
    context: PhaseContext, slot: Int, origin_token: Int, first: Int, num_tokens: Int
):
    """New keys, and new values: where they come from and where they go to.

    Args:
      context: Of the phase.
      slot: Of the ring of new tokens.
      origin_token: Number in the flat arrays of the token that the slot begins with.
      first: That of the first token to copy.
      num_tokens: How many to copy. Tokens that share words with them come along.
    """
    inputs, rings = context.inputs, context.rings
    layout = context.config.new_token_layout
    if isinstance(layout, TokenRows):
        return [
            (
                source.at[pl.ds(first, num_tokens)],
                some_tokens(
                    ring.at[slot], first - origin_token, num_tokens, source.shape[1]
                ),
            )
            for source, ring in (
                (inputs.keys, rings.keys),
                (inputs.values, rings.values),
            )
        ]
    shift = log2(layout.tokens_per_piece)
    begin = first >> shift
    end = (first + num_tokens + layout.tokens_per_piece - 1) >> shift
    place = begin - (origin_token >> shift)
    return [
        (
            source.at[:, pl.ds(begin, end - begin), column],
            ring.at[slot, :, column, pl.ds(place, end - begin)],
        )
        for source, ring in ((inputs.keys, rings.keys), (inputs.values, rings.values))
        for column in range(layout.columns)
    ]


def some_tokens(buffer, first: Int, num_tokens: Int, word_rows: int):
    """Tokens of a buffer, without the word rows that are there for the banks."""
    return buffer.at[pl.ds(first, num_tokens), pl.ds(0, word_rows)]


def _output_tokens(context: PhaseContext, slot: Int, num_tokens: Int):
    """The first tokens of each output buffer, and the output that they are for."""
    rings, outputs = context.rings, context.outputs
    return [
        (some_tokens(ring.at[slot], 0, num_tokens, output.shape[1]), output)
        for ring, output in ((rings.out, outputs.out), (rings.lse, outputs.lse))
        if output is not None
    ]

"""What the outputs have for the tokens that belong to no sequence.

The attention of nothing is zero, and the logarithm of its sum is minus infinity.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.config import KernelConfig
from jax_kernels.ragged_paged_attention.kernel.pages import wait_for
from jax_kernels.ragged_paged_attention.kernel.refs import (
    Outputs,
    Shaped,
    allocate_buffers,
)
from jax_kernels.ragged_paged_attention.kernel.schedule import Int, log2
from jax_kernels.ragged_paged_attention.token_layout import TokenRows

# Tokens that are cleared at once.
CLEARED_TOKENS = 32


class ClearedTokens(NamedTuple):
    """Tokens as they are copied to each output, in VMEM; fields as in ``Outputs``."""

    out: Any  # zeros[CLEARED_TOKENS, word rows, packing, row_lanes]
    lse: Any  # minus infinity[CLEARED_TOKENS, word rows, 1, 128], or None


class ClearScratch(NamedTuple):
    """What clearing needs."""

    cleared: ClearedTokens
    semaphore: Any  # one for all copies


def cleared_shapes(config: KernelConfig) -> ClearedTokens:
    """``Shaped`` in the place of each buffer, or None."""

    def tokens(layout: TokenRows) -> Shaped:
        return Shaped(layout.shape(CLEARED_TOKENS), layout.dtype)

    return ClearedTokens(
        out=tokens(config.out_layout),
        lse=tokens(config.lse_layout) if config.spec.return_lse else None,
    )


def allocate(config: KernelConfig) -> ClearScratch:
    """Scratch types."""
    return ClearScratch(
        allocate_buffers(cleared_shapes(config)), pltpu.SemaphoreType.DMA(())
    )


@dataclasses.dataclass(frozen=True)
class OutputClearer:
    """Clears the tokens of the outputs that belong to no sequence.

    Attributes:
      num_tokens: T.
      outputs: In HBM.
      scratch: Cleared tokens and a semaphore.
    """

    num_tokens: int
    outputs: Outputs
    scratch: ClearScratch

    def start(self, first_token: Int) -> None:
        """Clears tokens first_token .. T."""
        cleared = self.scratch.cleared
        cleared.out[...] = jnp.zeros(cleared.out.shape, cleared.out.dtype)
        if cleared.lse is not None:
            cleared.lse[...] = jnp.full(cleared.lse.shape, -jnp.inf, jnp.float32)
        num_tokens = self.num_tokens - first_token
        num_whole = num_tokens >> log2(CLEARED_TOKENS)

        def clear(token: Int, size: Int) -> None:
            for source, target in self._pairs():
                pltpu.make_async_copy(
                    source.at[pl.ds(0, size)],
                    target.at[pl.ds(token, size)],
                    self.scratch.semaphore,
                ).start()

        def whole_piece(index: Int, _) -> None:
            clear(first_token + index * CLEARED_TOKENS, CLEARED_TOKENS)

        jax.lax.fori_loop(0, num_whole, whole_piece, None)
        rest = num_tokens & (CLEARED_TOKENS - 1)

        @pl.when(rest > 0)
        def _():
            clear(first_token + num_whole * CLEARED_TOKENS, rest)

    def wait(self, first_token: Int) -> None:
        num_tokens = self.num_tokens - first_token

        @pl.when(num_tokens > 0)
        def _():
            for _, target in self._pairs():
                cleared = target.at[pl.ds(first_token, num_tokens)]
                wait_for(cleared, self.scratch.semaphore)

    def _pairs(self) -> Iterator[tuple[Any, Any]]:
        """Cleared tokens, and the output that they are for."""
        for name, source in self.scratch.cleared._asdict().items():
            if source is not None:
                yield source, getattr(self.outputs, name)

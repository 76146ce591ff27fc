"""Zeros for the tokens of the output that belong to no sequence."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.config import KernelConfig
from jax_kernels.ragged_paged_attention.kernel.pages import wait_for
from jax_kernels.ragged_paged_attention.kernel.refs import Shaped
from jax_kernels.ragged_paged_attention.kernel.schedule import Int, log2

# Tokens of zeros that are copied at once.
ZERO_TOKENS = 32


class ZeroScratch(NamedTuple):
    """What clearing needs."""

    zeros: Any  # VMEM, [ZERO_TOKENS, word rows, packing, row_lanes]
    semaphore: Any  # one for all copies


def zeros_shape(config: KernelConfig) -> Shaped:
    """Shape and dtype of ``ZeroScratch.zeros``."""
    return Shaped(config.out_layout.shape(ZERO_TOKENS), config.out_dtype)


def allocate(config: KernelConfig) -> ZeroScratch:
    """Scratch types."""
    return ZeroScratch(pltpu.VMEM(*zeros_shape(config)), pltpu.SemaphoreType.DMA(()))


@dataclasses.dataclass(frozen=True)
class OutputClearer:
    """Zeros the tokens of the output that belong to no sequence.

    Attributes:
      num_tokens: T.
      out: The output in HBM.
      scratch: Zeros and a semaphore.
    """

    num_tokens: int
    out: Any
    scratch: ZeroScratch

    def start(self, first_token: Int) -> None:
        """Clears tokens first_token .. T."""
        num_tokens = self.num_tokens - first_token
        num_whole = num_tokens >> log2(ZERO_TOKENS)

        def clear(token: Int, size: Int) -> None:
            pltpu.make_async_copy(
                self.scratch.zeros.at[pl.ds(0, size)],
                self.out.at[pl.ds(token, size)],
                self.scratch.semaphore,
            ).start()

        def whole_piece(index: Int, _) -> None:
            clear(first_token + index * ZERO_TOKENS, ZERO_TOKENS)

        jax.lax.fori_loop(0, num_whole, whole_piece, None)
        rest = num_tokens & (ZERO_TOKENS - 1)

        @pl.when(rest > 0)
        def _():
            clear(first_token + num_whole * ZERO_TOKENS, rest)

    def wait(self, first_token: Int) -> None:
        num_tokens = self.num_tokens - first_token

        @pl.when(num_tokens > 0)
        def _():
            cleared = self.out.at[pl.ds(first_token, num_tokens)]
            wait_for(cleared, self.scratch.semaphore)

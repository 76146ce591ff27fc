"""What the code of one phase works on."""

import dataclasses
from typing import Generic, Protocol, TypeVar

from jax_kernels.ragged_paged_attention.config import KernelConfig, PhaseConfig
from jax_kernels.ragged_paged_attention.kernel.head_factors import HeadFactors
from jax_kernels.ragged_paged_attention.kernel.refs import (
    Bookkeeping,
    Inputs,
    Outputs,
    Rings,
    ScalarRefs,
    Semaphores,
)
from jax_kernels.ragged_paged_attention.kernel.schedule import Schedule


class HasRings(Protocol):
    """The buffers of either loop."""

    @property
    def rings(self) -> Rings: ...


BuffersT = TypeVar("BuffersT", bound=HasRings)


@dataclasses.dataclass(frozen=True)
class PhaseContext(Generic[BuffersT]):
    """Everything that a phase reads, writes and keeps.

    Attributes:
      schedule: Cell arithmetic, and what is static.
      scalars: Lengths and page table.
      inputs: Arrays that are read.
      outputs: Arrays that are written.
      buffers: VMEM, as the loop names it.
      bookkeeping: What is in flight.
      semaphores: One per slot and kind of copy.
    """

    schedule: Schedule
    scalars: ScalarRefs
    inputs: Inputs
    outputs: Outputs
    buffers: BuffersT
    bookkeeping: Bookkeeping
    semaphores: Semaphores

    @property
    def config(self) -> KernelConfig:
        return self.schedule.config

    @property
    def phase(self) -> PhaseConfig:
        return self.schedule.phase

    @property
    def rings(self) -> Rings:
        return self.buffers.rings

    @property
    def head_factors(self) -> HeadFactors:
        """What differs by key head because scales are arrays."""
        config = self.config
        return HeadFactors(
            self.inputs.head_factors, config.numerics.head_factors, config.num_kv_heads
        )

    @property
    def updates(self) -> bool:
        """Whether new tokens are written to the cache."""
        return self.config.spec.update_kv_cache

    @property
    def carries(self) -> bool:
        """Whether packed tokens are copied from slot to slot.

        To pack them again is as cheap where the chip has an instruction for it.
        """
        return self.updates and self.config.numerics.rounds_in_software

"""Tries block sizes: whether they fit, and what they cost."""

from __future__ import annotations

import dataclasses
import functools

from benchmarks import block_choice, cases, compiler, measurement, prediction
from benchmarks.tpu_timing import Program, SimulationError
from benchmarks.tuning.search import CandidateError
from jax_kernels.chips import Chip
from jax_kernels.ragged_paged_attention import block_sizes
from jax_kernels.ragged_paged_attention.config import BlockSizes


def check_fits(
    shape: cases.StaticShape, chip: Chip, blocks: BlockSizes, phase: str
) -> None:
    """Raises where the buffers of one phase, or lengths and pages, do not fit.

    Raises:
      CandidateError: With the estimate.
    """
    problem, spec = block_choice.problem_of(shape)
    config = block_sizes.make_config(problem, spec, blocks, None, False)
    phases = tuple(p for p in config.phases if p.is_decode == (phase == "decode"))
    config = dataclasses.replace(config, phases=phases)
    limit = int(chip.vmem_bytes * block_sizes.VMEM_LIMIT_SHARE)
    try:
        block_sizes.check_fits(problem, config, chip, limit)
    except ValueError as error:
        raise CandidateError(str(error)) from error


def predict_blocks(
    shape: cases.StaticShape, chip: Chip, blocks: BlockSizes
) -> dict[str, dict[str, float]]:
    """Predicted cycles of each step, waits for instructions included.

    How the program is cut into overlays depends on the sizes of both phases, so a small
    part of these waits is of the other phase's candidate.
    """

    def cycles(program: Program, name: str, lengths: str) -> float:
        case = cases.Case(name, shape, lengths)
        return prediction.predict(case, chip, program).result.cycles

    try:
        program = compiler.compile_program(
            shape, chip.name, dataclasses.astuple(blocks)
        )
        return {
            phase: {name: cycles(program, name, steps[name]) for name in steps}
            for phase, steps in cases.TUNING_STEPS.items()
        }
    except (RuntimeError, SimulationError) as error:
        raise CandidateError(str(error)) from error


def time_blocks(
    shape: cases.StaticShape, chip: Chip, blocks: BlockSizes
) -> dict[str, dict[str, float]]:
    """Measured time of each step, in cycles of the chip's clock."""
    import jax

    from jax_kernels.ragged_paged_attention import ragged_paged_attention

    attention = functools.partial(
        ragged_paged_attention, chip=chip.name, block_sizes=blocks
    )
    repetition = measurement.Repetition(warm_up=2, repeats=10, calls=8)

    def cycles(name: str, lengths: str) -> float:
        case = cases.Case(name, shape, lengths)
        _, timed = measurement.time_with_jax(case, repetition, attention)
        return timed.median * chip.rates.clock_hz

    try:
        return {
            phase: {name: cycles(name, steps[name]) for name in steps}
            for phase, steps in cases.TUNING_STEPS.items()
        }
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise CandidateError(str(error)) from error

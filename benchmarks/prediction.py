"""Predictions of steps: the compiled program of a case, executed for its lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from benchmarks import accuracy, block_choice, cases, compiler, environment
from benchmarks.progress import Progress
from benchmarks.tpu_timing import DmaModel, Program, Result, report, simulate, workloads
from jax_kernels.chips import Chip

PREDICTED = "PREDICTED from the compiled schedule, not measured"

# What the kernel reads back from the vector unit is the largest sum of probabilities
# after each cell of prefill. No number of real scores is out of range.
SUMS_IN_RANGE = 0


def describe(chip: str) -> dict[str, str]:
    """What predicted figures depend on, and how far such figures can be trusted."""
    return environment.describe(chip) | {
        "figures": PREDICTED,
        "accuracy": accuracy.in_words(chip),
    }


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the instrument says of one case.

    Attributes:
      case: The step.
      chip: Where it would run.
      result: Cycles, waits, loops, at the highest clock.
      shares: MBU, MFU and the like, see ``workloads.utilization``.
      default_clock_us: Time where libtpu is not told to hold the highest clock; None if
        the chip has but one clock, or if it was not asked for.
      around_us: Time of what XLA puts around the kernel: its bytes, at the speed of
        copies. ``result`` is of the kernel alone.
    """

    case: cases.Case
    chip: Chip
    result: Result
    shares: dict[str, float]
    default_clock_us: float | None = None
    around_us: float = 0.0

    @property
    def cap(self) -> float:
        """The MFU that the head dimension allows."""
        return workloads.attention_cap(self.case.shape.model.head_dim, self.chip)

    @property
    def total_us(self) -> float:
        """Of the kernel and of what is around it."""
        return self.result.microseconds + self.around_us

    @property
    def bound_us(self) -> float:
        """The least time, see ``workloads.bound_seconds``."""
        return 1e6 * workloads.bound_seconds(self.case.ideal, self.chip, self.cap)

    @property
    def of_bound(self) -> float:
        """The bound by the time of all."""
        return self.bound_us / self.total_us

    @property
    def kind(self) -> str:
        """Of the step, see ``accuracy.kind_of``."""
        head_dim = self.case.shape.model.head_dim
        return accuracy.kind_of(self.result.microseconds, self.case.sequences, head_dim)

    @property
    def expected(self) -> accuracy.Range:
        """Where a measured time is, as multiples of the predicted one."""
        return accuracy.expected(self.kind, self.chip.name)

    def as_dict(self) -> dict:
        case = self.case
        return {
            "case": case.name,
            "chip": self.chip.name,
            "kind": "prediction",
            "lengths": case.lengths,
            "shape": dataclasses.asdict(case.shape),
            "blocks": dataclasses.asdict(
                block_choice.explain(case.shape, self.chip.name)
            ),
            "microseconds": self.result.microseconds,
            "step": self.kind,
            "expected": dataclasses.asdict(self.expected),
            "default_clock_microseconds": self.default_clock_us,
            "around_microseconds": self.around_us,
            **self.shares,
            "mfu_cap": self.cap,
            "bound_microseconds": self.bound_us,
            "result": report.as_dict(self.result),
        }


def predict(
    case: cases.Case,
    chip: Chip,
    program: Program,
    dma_model: DmaModel | None = None,
    *,
    keep_timeline: bool = False,
    both_clocks: bool = False,
) -> Prediction:
    """Executes the program of a case's shape for the case's lengths."""
    dma_model = dma_model or DmaModel()
    scalars = case.scalars
    result = simulate(
        program,
        chip,
        scalars,
        dma_model,
        keep_timeline=keep_timeline,
        vector_results=SUMS_IN_RANGE,
    )
    shares = workloads.utilization(result.seconds, chip, case.ideal)
    default_clock_us = None
    if both_clocks and chip.rates.default_clock_hz is not None:
        slower = simulate(
            program,
            chip.at_clock("default"),
            scalars,
            dma_model,
            vector_results=SUMS_IN_RANGE,
        )
        default_clock_us = slower.microseconds
    bytes_per_s = chip.rates.hbm_bytes_per_s * dma_model.efficiency
    around_us = 1e6 * program.bytes_around / bytes_per_s
    return Prediction(case, chip, result, shares, default_clock_us, around_us)


def predict_all(
    selected: Iterable[cases.Case],
    chip: Chip,
    dma_model: DmaModel | None = None,
    *,
    both_clocks: bool = False,
) -> Iterator[Prediction]:
    """Predicts cases one after the other; those of one shape share a compilation.

    Says on standard error how far it is.
    """
    by_shape = cases.by_shape(selected)
    progress = Progress(len(by_shape))
    for shape, members in by_shape.items():
        with progress.compiling(cases.in_words(members)):
            program = compiler.compile_program(shape, chip.name)
        for case in members:
            with progress.executing(case.name):
                prediction = predict(
                    case, chip, program, dma_model, both_clocks=both_clocks
                )
            yield prediction


def scaled_cases(case: cases.Case) -> tuple[list[cases.Case], list[cases.Case]]:
    """Steps of the same program: over context and over the number of sequences.

    Contexts double up to what the page table holds, numbers of sequences up to that
    of the case; in each step all sequences are like the case's first.
    """
    shape, sequences = case.shape, case.sequences
    count, first = len(sequences), sequences[0]
    if count * first.q_len > shape.num_tokens:
        count = shape.num_tokens // first.q_len
    longest = shape.pages_per_sequence * shape.page_size

    def like(count: int, kv_len: int) -> cases.Case:
        lengths = f"{count}*{first.q_len}/{kv_len}"
        return dataclasses.replace(case, name=lengths, lengths=lengths)

    contexts = [n for n in _doubling(128, longest) if n >= first.q_len]
    batches = _doubling(1, count)
    return (
        [like(count, kv_len) for kv_len in contexts],
        [like(n, first.kv_len) for n in batches],
    )


def _doubling(first: int, last: int) -> list[int]:
    """first, 2 * first, ... and last."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return [*sizes, last]

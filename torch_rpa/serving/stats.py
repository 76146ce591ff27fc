"""What the steps of an engine did, one by one and in sum."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One call of ``Engine.step`` that started a step.

    Attributes:
        start: When it was called, by ``time.perf_counter()``.
        seconds: Wall time of the call, compilation included.
        num_tokens: Tokens computed, without padding.
        num_padded_tokens: The same with padding.
        num_sequences: Rows of the step.
        num_decodes: Rows of a single token.
        num_waiting: Requests that wait to start.
        num_pages_held: Pages in use.
        num_generated: Tokens that reached requests during the call.
        num_compilations: Programs that were compiled during the call.
    """

    start: float
    seconds: float
    num_tokens: int
    num_padded_tokens: int
    num_sequences: int
    num_decodes: int
    num_waiting: int
    num_pages_held: int
    num_generated: int
    num_compilations: int


@dataclasses.dataclass
class EngineStats:
    """Sums over all steps so far.

    Attributes:
        num_steps: Steps started.
        num_failed_steps: Steps that raised and were rolled back.
        num_tokens: Tokens computed, without padding.
        num_padded_tokens: The same with padding.
        num_sequences: Rows of all steps.
        num_generated: Tokens generated for requests.
        num_surplus: Tokens generated for requests that had ended, and dropped.
        num_shared_tokens: Tokens found in the prefix cache instead of computed.
        num_preemptions: How often a request lost its pages.
        peak_pages_held: Most pages in use at once.
        num_compilations: Programs compiled, that which makes the caches included.
        max_compilations: Most programs that the engine can ever need.
        seconds: Wall time of all steps.
        compiling_seconds: Wall time of the steps that compiled.
        compiling_generated: Tokens generated during those.
    """

    num_steps: int = 0
    num_failed_steps: int = 0
    num_tokens: int = 0
    num_padded_tokens: int = 0
    num_sequences: int = 0
    num_generated: int = 0
    num_surplus: int = 0
    num_shared_tokens: int = 0
    num_preemptions: int = 0
    peak_pages_held: int = 0
    num_compilations: int = 0
    max_compilations: int = 0
    seconds: float = 0.0
    compiling_seconds: float = 0.0
    compiling_generated: int = 0

    def add(self, record: StepRecord) -> None:
        """Adds a step, apart from what the engine counts itself."""
        self.num_steps += 1
        self.num_tokens += record.num_tokens
        self.num_padded_tokens += record.num_padded_tokens
        self.num_sequences += record.num_sequences
        self.peak_pages_held = max(self.peak_pages_held, record.num_pages_held)
        self.num_compilations += record.num_compilations
        if record.num_compilations:
            self.compiling_seconds += record.seconds
            self.compiling_generated += record.num_generated

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens for each second in steps, compilation included."""
        return _ratio(self.num_generated, self.seconds)

    @property
    def compiled_tokens_per_second(self) -> float:
        """The same over the steps that compiled nothing."""
        return _ratio(
            self.num_generated - self.compiling_generated,
            self.seconds - self.compiling_seconds,
        )

    @property
    def mean_sequences(self) -> float:
        """Rows of a step on average."""
        return _ratio(self.num_sequences, self.num_steps)

    @property
    def padding_share(self) -> float:
        """Which part of the computed tokens was padding."""
        return 1 - _ratio(self.num_tokens, self.num_padded_tokens)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0

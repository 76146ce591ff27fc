"""Starts steps on the device and waits for none of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from torch_rpa.scheduling import Request, Row
from torch_rpa.serving import sampling
from torch_rpa.serving.entries import Entry, following_prompt_tokens
from torch_rpa.serving.logits_processing import build_logits_inputs, num_special_tokens
from torch_rpa.serving.logprobs import LogprobTensors
from torch_rpa.serving.sampling import SamplingInputs
from torch_rpa.serving.sampling_params import SamplingParams
from torch_rpa.serving.step_programs import Logits, StepPrograms
from torch_rpa.transformers.model_runner import ModelRunner
from torch_rpa.transformers.step_inputs import StepShapes, build_step_inputs

_ENDED = SamplingParams()


@dataclasses.dataclass(eq=False)
class Flight:
    """A step, from its plan until its tokens are on the host.

    Attributes:
        rows: What it computes.
        generated: i64 ``[S]``, on the device, where it may still be computed; None
            before the step is started.
        logits: What the model says, where tokens are chosen in a program of their own.
        logprobs: Of the tokens of its rows, if some request wants them.
        prompt_logprobs: Of the tokens after all its tokens, likewise.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    generated: torch.Tensor | None = None
    logits: Logits | None = None
    logprobs: LogprobTensors | None = None
    prompt_logprobs: LogprobTensors | None = None


class StepRunner:
    """Runs planned steps, each on the tokens that the one before leaves on the device.

    Attributes:
        last_generated: i64 ``[S]``, the tokens of the latest step.
    """

    def __init__(
        self,
        runner: ModelRunner,
        shapes: StepShapes,
        entries: Mapping[Request, Entry],
        *,
        vocabulary: int,
        longest: int,
    ):
        """Compiles nothing yet.

        Args:
            runner: Has the model and its caches.
            shapes: Sizes that steps are padded to.
            entries: Of the requests that have not ended, also later.
            vocabulary: Number of logits.
            longest: Most tokens of a sequence.
        """
        self._runner = runner
        self._device = runner.device
        self._shapes = shapes
        self._entries = entries
        self._vocabulary = vocabulary
        self._longest = longest
        self._programs = StepPrograms(runner, len(shapes.token_buckets))
        self.last_generated = self._no_tokens()
        self._is_ready = True  # caches and last tokens are as steps left them

    @property
    def max_compilations(self) -> int:
        """Most programs that the steps so far may have compiled."""
        return self._programs.max_compilations

    def lose(self) -> None:
        """Notes that a step failed, after which nothing on the device is relied upon.

        What the caches hold is not known then. Some devices have taken them away for a
        program that did not end.
        """
        self._is_ready = False

    def prepare(self) -> None:
        """Makes new caches if they were lost."""
        if not self._is_ready:
            # First: what a failed step was to compute must not be wanted any more.
            self.last_generated = self._no_tokens()
            self._runner.renew_caches()
            self._is_ready = True

    def warm_up(
        self, *, with_sampling: bool, with_logits: bool, with_prompt_logprobs: bool
    ) -> None:
        """Compiles programs, as ``Engine.warm_up`` says, on steps without rows."""
        self.prepare()
        for size in self._shapes.token_buckets:
            for is_greedy in (True, False) if with_sampling else (True,):
                self.run([], size, is_greedy)
            for all_positions in [False] * with_logits + [True] * with_prompt_logprobs:
                flight = Flight()
                self._start_model(flight, size, all_positions=all_positions)
                self.choose(flight, with_logprobs=True)
        self.last_generated.cpu()

    def start(self, flight: Flight) -> None:
        """Starts a step; if it has logits then, :meth:`choose` is to follow.

        That is when some request changes its logits or reports log probabilities.
        """
        rows = flight.rows
        entries = [self._entries[row.request] for row in rows]
        size = self._shapes.bucket(sum(row.num_tokens for row in rows))
        reports_prompt = any(
            entry.output.prompt_logprobs is not None
            and row.start < len(entry.output.prompt_ids)
            for entry, row in zip(entries, rows, strict=True)
        )
        choosing = [e for e, row in zip(entries, rows, strict=True) if row.is_last]
        if reports_prompt or any(
            entry.rules or entry.output.logprobs is not None for entry in choosing
        ):
            self._start_model(flight, size, all_positions=reports_prompt)
        else:
            is_greedy = all(entry.params.temperature == 0 for entry in choosing)
            flight.generated = self.run(rows, size, is_greedy)

    def run(self, rows: Sequence[Row], size: int, is_greedy: bool) -> torch.Tensor:
        """Starts a step that is one program; returns its tokens i64 ``[S]``."""
        inputs = build_step_inputs(rows, self._shapes, size).to(self._device)
        wishes = None
        if not is_greedy:
            wishes = self._sampling_inputs(rows).to(self._device)
        self.last_generated = self._programs.tokens(inputs, self.last_generated, wishes)
        return self.last_generated

    def choose(self, flight: Flight, *, with_logprobs: bool = False) -> None:
        """Chooses the tokens of a step when all tokens before them are known.

        Args:
            flight: Has logits; they are gone afterwards.
            with_logprobs: Also computes log probabilities that nobody has asked for.
        """
        assert flight.logits is not None
        # A request may have ended meanwhile.
        entries = [self._entries.get(row.request) for row in flight.rows]
        rules = [
            entry.rules if entry and row.is_last else None
            for entry, row in zip(entries, flight.rows, strict=True)
        ]
        vocabulary = flight.logits.last.shape[-1]
        changes = build_logits_inputs(
            rules,
            num_rows=self._shapes.num_sequences,
            num_special=num_special_tokens(vocabulary, self._longest),
            vocabulary=vocabulary,
        )
        generated = self._programs.choose(
            flight.logits,
            self._sampling_inputs(flight.rows).to(self._device),
            changes.to(self._device),
        )
        if with_logprobs or any(e and e.output.logprobs is not None for e in entries):
            flight.logprobs = self._programs.logprobs(flight.logits.last, generated)
        flight.logits = None
        flight.generated = self.last_generated = generated

    def _start_model(self, flight: Flight, size: int, *, all_positions: bool) -> None:
        """Starts a step whose tokens are chosen later."""
        inputs = build_step_inputs(flight.rows, self._shapes, size).to(self._device)
        flight.logits = self._programs.logits(
            inputs, self.last_generated, all_positions=all_positions
        )
        if flight.logits.all is not None:
            following = [
                token for row in flight.rows for token in following_prompt_tokens(row)
            ]
            following += [0] * (len(flight.logits.all) - len(following))
            flight.prompt_logprobs = self._programs.logprobs(
                flight.logits.all, torch.tensor(following).to(self._device)
            )

    def _sampling_inputs(self, rows: Sequence[Row]) -> SamplingInputs:
        entries = [self._entries.get(row.request) for row in rows]
        return sampling.build_sampling_inputs(
            [
                (entry.params, entry.seed, row.end) if entry else (_ENDED, 0, 0)
                for entry, row in zip(entries, rows, strict=True)
            ],
            num_rows=self._shapes.num_sequences,
            vocabulary=self._vocabulary,
        )

    def _no_tokens(self) -> torch.Tensor:
        zeros = torch.zeros(self._shapes.num_sequences, dtype=torch.int64)
        return zeros.to(self._device)

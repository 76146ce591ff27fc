"""The programs of a step, from its inputs to tokens and log probabilities.

Most steps are one program: the model and the choice of tokens. A step in which some
request changes its logits, or reports log probabilities, is two or more::

    usual     model + choice
    with      model | read the tokens of the step before | changes + choice | logprobs

So what a request asks of its logits may depend on every token before, and yet the model
runs while the host reads the last of them. Only the first of these programs depends on
the number of tokens. Each is compiled when a request first needs it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from torch_rpa import devices
from torch_rpa.serving import logits_processing, sampling
from torch_rpa.serving.finite import NONE_LEFT, marking
from torch_rpa.serving.logits_processing import LogitsInputs
from torch_rpa.serving.logprobs import LogprobTensors, token_logprobs
from torch_rpa.serving.sampling import SamplingInputs
from torch_rpa.transformers.model_runner import ModelRunner
from torch_rpa.transformers.step_inputs import StepInputs


@dataclasses.dataclass(frozen=True)
class Logits:
    """What the model says of a step, before tokens are chosen; on the device.

    Attributes:
        last: ``[S, V]`` after the last token of each row.
        all: ``[T, V]`` after each token, if asked for.
    """

    last: torch.Tensor
    all: torch.Tensor | None = None


class StepPrograms:
    """Runs the steps of an engine.

    Attributes:
        max_compilations: Most programs that the calls so far may have compiled.
    """

    def __init__(self, runner: ModelRunner, num_buckets: int):
        """Compiles nothing yet.

        Args:
            runner: Has the model and its caches.
            num_buckets: Sizes that steps have; 0 if nothing is compiled.
        """
        self._runner = runner
        self._num_buckets = num_buckets
        self._is_compiled = devices.is_compiled(runner.device)
        self._known: set[str] = set()
        # Each bucket with greedy and with sampling rows, and the caches.
        self.max_compilations = 2 * num_buckets + 1 if self._is_compiled else 0
        self._greedy = runner.step(marking(sampling.greedy))
        self._sample = runner.step(marking(sampling.sample))
        self._last_logits = runner.step(lambda logits: logits)
        self._all_logits = runner.step(_with_last, all_positions=True)
        self._choose = runner.compiled(marking(_choose))
        self._logprobs = runner.compiled(token_logprobs)

    def tokens(
        self,
        inputs: StepInputs,
        last_generated: torch.Tensor,
        wishes: SamplingInputs | None,
    ) -> torch.Tensor:
        """Starts a usual step; returns its tokens i64 ``[S]``.

        Args:
            inputs: On the device.
            last_generated: i64 ``[S]``, the tokens of the step before.
            wishes: On the device; None if all rows are greedy.
        """
        if wishes is None:
            generated = self._greedy(inputs, last_generated)
        else:
            generated = self._sample(inputs, last_generated, wishes)
        self._runner.sync()
        return generated

    def logits(
        self, inputs: StepInputs, last_generated: torch.Tensor, *, all_positions: bool
    ) -> Logits:
        """Starts the model alone; :meth:`choose` follows."""
        if all_positions:
            self._count("all logits", self._num_buckets)
            everywhere, last = self._all_logits(
                inputs, last_generated, inputs.last_tokens
            )
            logits = Logits(last, everywhere)
        else:
            self._count("logits", self._num_buckets)
            logits = Logits(self._last_logits(inputs, last_generated))
        self._runner.sync()
        return logits

    def choose(
        self, logits: Logits, wishes: SamplingInputs, changes: LogitsInputs
    ) -> torch.Tensor:
        """Starts the choice of tokens; returns them, i64 ``[S]``."""
        self._count("choose", 1)
        generated = self._choose(logits.last, wishes, changes)
        self._runner.sync()
        return generated

    def logprobs(self, logits: torch.Tensor, tokens: torch.Tensor) -> LogprobTensors:
        """Starts the log probabilities of tokens i64 ``[N]`` by logits ``[N, V]``."""
        self._count(f"log probabilities of {len(logits)}", 1)
        found = self._logprobs(logits, tokens)
        self._runner.sync()
        return found

    def _count(self, name: str, num_programs: int) -> None:
        if self._is_compiled and name not in self._known:
            self._known.add(name)
            self.max_compilations += num_programs


def _with_last(
    logits: torch.Tensor, last_tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return logits, logits[last_tokens]


def _choose(logits: torch.Tensor, wishes: SamplingInputs, changes: LogitsInputs) -> Any:
    changed = logits_processing.process(logits, changes)
    return marking(sampling.sample, NONE_LEFT)(changed, wishes)

"""A request between its arrival and its end, and what a token changes of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from torch_rpa.scheduling import Request, Row
from torch_rpa.serving.logits_processing import TokenRules
from torch_rpa.serving.logprobs import LogprobTensors
from torch_rpa.serving.outputs import GenerationOutput, RequestStatus
from torch_rpa.serving.sampling_params import SamplingParams
from torch_rpa.serving.structured import TextGrammar


@dataclasses.dataclass(eq=False)
class Entry:
    """One text of a request that has not ended: its plan, its wishes and its state.

    Attributes:
        request: What the scheduler knows of it.
        params: Sampling and stop conditions; bad words are token ids by now.
        seed: Of its random numbers.
        output: What its user sees.
        rules: What it asks of its logits; None if it leaves them as they are.
        grammar: What the text must be like; None if it may be anything.
    """

    request: Request
    params: SamplingParams
    seed: int
    output: GenerationOutput
    rules: TokenRules | None
    grammar: TextGrammar | None

    def receive(self, token: int) -> None:
        """Adds a generated token, and notes the reason if the text ends with it."""
        output = self.output
        self.request.append(token)
        output.generated_tokens.append(token)
        if self.rules is not None:
            self.rules.append(token)
        output.timestamps.append(time.perf_counter())
        output.status = RequestStatus.DECODING
        output.num_preemptions = self.request.num_preemptions
        output.finish_reason, output.stop_reason = self._finish_reason(token)

    def receive_logprobs(
        self,
        logprobs: LogprobTensors,
        index: int,
        token: int,
        decode: Callable[[int], str] | None,
    ) -> None:
        """Adds the log probabilities of a generated token, if they were asked for.

        Args:
            logprobs: Of a step, on the CPU.
            index: The row of the token.
            token: Which is received after them.
            decode: Gives the text of a token.
        """
        if self.output.logprobs is not None:
            count = self.params.logprobs or 0
            self.output.logprobs.append(logprobs.at(index, token, count, decode))

    def receive_prompt_logprobs(
        self,
        logprobs: LogprobTensors,
        first: int,
        row: Row,
        decode: Callable[[int], str] | None,
    ) -> None:
        """Adds those of the prompt tokens after each of a row, if they were asked for.

        Args:
            logprobs: At all positions of a step, on the CPU.
            first: The position of the row's first token there.
            row: Of this request.
            decode: Gives the text of a token.
        """
        found, count = self.output.prompt_logprobs, self.params.prompt_logprobs
        if found is None or count is None:
            return
        following = following_prompt_tokens(row)
        positions = range(row.start + 1, min(row.end + 1, row.request.num_prompt))
        for index, position in enumerate(positions):
            found[position] = logprobs.at(
                first + index, following[index], count, decode
            )

    def _finish_reason(self, token: int) -> tuple[str | None, str | int | None]:
        """Returns why the text ends, and what ended it; None if it goes on."""
        params, request = self.params, self.request
        ends: Any = params.eos_token_ids  # tuples by now, like the sequences
        sequences: Any = params.stop_sequences
        may_stop = request.num_generated >= params.min_tokens
        found = None
        if self.output.output_text is not None:
            found = self.output.output_text.add(token, may_stop=may_stop)
        if may_stop:
            if token in ends:
                return "stop", token
            for sequence in sequences:
                num_tokens = len(sequence)
                if num_tokens <= request.num_generated and (
                    tuple(request.tokens[-num_tokens:]) == sequence
                ):
                    return "stop", token
            if found is not None:
                return "stop", found
        if self.grammar is not None and self.grammar.is_complete:
            return "stop", None
        if request.num_generated >= request.max_new_tokens:
            return "length", None
        return None, None


def following_prompt_tokens(row: Row) -> list[int]:
    """Returns the token of the prompt after each position of a row, 0 for others."""
    prompt = row.request.prompt
    following = prompt[row.start + 1 : row.end + 1]
    return following + [0] * (row.num_tokens - len(following))

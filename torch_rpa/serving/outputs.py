"""What comes back for a request; close to transformers' continuous batching."""

from __future__ import annotations

import dataclasses
import enum
import functools
import time

from torch_rpa.serving.logprobs import Logprob
from torch_rpa.serving.text import OutputText


class RequestStatus(enum.IntEnum):
    """Where a request is; the first five are numbered as those of transformers."""

    PENDING = 0
    PREFILLING = 1
    DECODING = 2
    FINISHED = 3
    FAILED = 4
    CANCELLED = 5


@dataclasses.dataclass(eq=False)
class GenerationOutput:
    """The state of a request, and in the end its result.

    Attributes:
        request_id: Its name.
        prompt_ids: Token ids of the prompt.
        generated_tokens: Token ids after it, so far.
        logprobs: For each of those the log probability, and those of the most likely
            tokens there, by token id; None if they were not asked for.
        prompt_logprobs: The same for each token of the prompt. Nothing comes before the
            first one, which has None, and so have those that are not computed yet.
        index: Which of the ``n`` texts of its prompt it is.
        status: Where it is. A preempted request keeps its status.
        error: What went wrong, if it failed.
        finish_reason: ``"length"``, or ``"stop"`` at a stop condition; None if it has
            not finished.
        stop_reason: The stop string or the token that ended it; None if none did.
        num_shared_tokens: Tokens of the prompt that were found in the prefix cache.
        num_preemptions: How often it lost its pages and was computed again.
        created_time: When it was added, by ``time.perf_counter()``.
        lifespan: When it was first computed and when it ended; -1 before.
        timestamps: When each generated token reached the host.
        output_text: Makes the text; None if the engine has no tokenizer.
    """

    request_id: str
    prompt_ids: list[int]
    generated_tokens: list[int] = dataclasses.field(default_factory=list)
    status: RequestStatus = RequestStatus.PENDING
    error: str | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    index: int = 0
    num_shared_tokens: int = 0
    num_preemptions: int = 0
    created_time: float = dataclasses.field(default_factory=time.perf_counter)
    lifespan: tuple[float, float] = (-1, -1)
    timestamps: list[float] = dataclasses.field(default_factory=list)
    output_text: OutputText | None = dataclasses.field(default=None, repr=False)

    @property
    def text(self) -> str:
        """The text so far. A stop string is cut off, unless it was asked for.

        Raises:
            ValueError: The engine has no tokenizer.
        """
        return self._output_text().text()

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum of the log probabilities of the generated tokens, if asked for."""
        if self.logprobs is None:
            return None
        pairs = zip(self.logprobs, self.generated_tokens, strict=False)
        return sum(found[token].logprob for found, token in pairs)

    def _output_text(self) -> OutputText:
        if self.output_text is None:
            raise ValueError("tokenizer must be given to the engine for text, got None")
        return self.output_text

    def is_finished(self) -> bool:
        """Whether nothing more will happen: it finished, failed or was cancelled."""
        return self.status >= RequestStatus.FINISHED


@dataclasses.dataclass(frozen=True)
class RequestUpdate:
    """What a step brought for one request.

    Attributes:
        output: The state of the request, which later steps update in place.
        new_tokens: Token ids that the step added; empty if it only ended the request.
        is_last: Whether this is the last update of the request.
    """

    output: GenerationOutput
    new_tokens: list[int]
    is_last: bool

    @functools.cached_property
    def new_text(self) -> str:
        """What ``output.text`` has got since the last update that was asked for it.

        Raises:
            ValueError: The engine has no tokenizer.
        """
        return self.output._output_text().take()

    @property
    def request_id(self) -> str:
        """The name of the request."""
        return self.output.request_id


def name_of_text(request_id: str, index: int) -> str:
    """Returns the name of a text of a request, as transformers has it."""
    return f"{request_id}__child#{index - 1}" if index else request_id

"""What comes back for a request; close to transformers' continuous batching."""

from __future__ import annotations

import dataclasses
import enum
import time


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
        status: Where it is. A preempted request keeps its status.
        error: What went wrong, if it failed.
        finish_reason: ``"length"``, or ``"stop"`` at a stop condition; None if it has
            not finished.
        num_shared_tokens: Tokens of the prompt that were found in the prefix cache.
        num_preemptions: How often it lost its pages and was computed again.
        created_time: When it was added, by ``time.perf_counter()``.
        lifespan: When it was first computed and when it ended; -1 before.
        timestamps: When each generated token reached the host.
    """

    request_id: str
    prompt_ids: list[int]
    generated_tokens: list[int] = dataclasses.field(default_factory=list)
    status: RequestStatus = RequestStatus.PENDING
    error: str | None = None
    finish_reason: str | None = None
    num_shared_tokens: int = 0
    num_preemptions: int = 0
    created_time: float = dataclasses.field(default_factory=time.perf_counter)
    lifespan: tuple[float, float] = (-1, -1)
    timestamps: list[float] = dataclasses.field(default_factory=list)

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

    @property
    def request_id(self) -> str:
        """The name of the request."""
        return self.output.request_id

"""Which tokens of which sequences a step computes, and the pages that they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch_rpa.generate.page_allocator import PageAllocator


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt and what has been generated for it.

    Attributes:
        prompt: Token ids, at least one.
        generated: Token ids after the prompt.
        pages: Pages that hold its keys and values, in order of position.
        num_cached: Leading tokens whose keys and values are in the pages.
    """

    prompt: list[int]
    generated: list[int] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)
    num_cached: int = 0

    @property
    def tokens(self) -> list[int]:
        """All tokens so far."""
        return self.prompt + self.generated

    @property
    def num_waiting(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.prompt) + len(self.generated) - self.num_cached


class Row(NamedTuple):
    """The part of a step that belongs to one request."""

    request: Request
    num_tokens: int  # new tokens; the first is token number request.num_cached

    @property
    def is_last(self) -> bool:
        """Whether the row ends with the request's last token, so that it samples."""
        return self.num_tokens == self.request.num_waiting


class Scheduler:
    """Plans steps until every request has ended.

    A step takes every request that waits with a single token, then as much of the
    others, in order, as fits the budget of tokens. With a budget of 8::

        waiting    5  1  9      ->  rows  1 (second)  5 (first)  2 (third)
        next step  1  1  7      ->  rows  1  1  6
        next step  1  1  1      ->  rows  1  1  1
    """

    def __init__(
        self,
        prompts: Iterable[Sequence[int]],
        allocator: PageAllocator,
        *,
        page_size: int,
        max_new_tokens: int,
        max_tokens_per_step: int,
        eos_token_ids: Iterable[int] = (),
    ):
        self.requests = [Request(list(prompt)) for prompt in prompts]
        self.live = list(self.requests)
        self.allocator = allocator
        self.page_size = page_size
        self.max_new_tokens = max_new_tokens
        self.max_tokens_per_step = max_tokens_per_step
        self.eos_token_ids = frozenset(eos_token_ids)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if max_tokens_per_step < len(self.requests):
            raise ValueError(
                f"max_tokens_per_step must be at least the {len(self.requests)} "
                f"prompts, got {max_tokens_per_step}"
            )
        for index, request in enumerate(self.requests):
            if not request.prompt:
                raise ValueError(f"prompt {index} must have at least one token, got 0")

    def next_step(self) -> list[Row]:
        """Returns the rows of the next step, those with one token first.

        Every row's request has pages for its new tokens. An empty list means that all
        requests have ended.
        """
        budget = self.max_tokens_per_step
        rows = []
        # Stable: requests keep their order within each group.
        for request in sorted(self.live, key=lambda request: request.num_waiting > 1):
            num_tokens = min(request.num_waiting, budget)
            if num_tokens:
                self._grow(request, request.num_cached + num_tokens)
                rows.append(Row(request, num_tokens))
                budget -= num_tokens
        return rows

    def complete(self, rows: Sequence[Row], next_tokens: Sequence[int]) -> int:
        """Records a step that was computed, and frees the pages of what has ended.

        Args:
            rows: What ``next_step`` returned.
            next_tokens: For each row the token that follows its last one; ignored for
                rows that stop before the end of their request.

        Returns:
            How many tokens were generated.
        """
        num_generated = 0
        sampled = [row.is_last for row in rows]
        self.advance(rows)
        for (request, _), samples, token in zip(
            rows, sampled, next_tokens, strict=True
        ):
            if not samples:
                continue
            request.generated.append(token)
            num_generated += 1
            if (
                token in self.eos_token_ids
                or len(request.generated) == self.max_new_tokens
            ):
                self.end(request)
        return num_generated

    def advance(self, rows: Sequence[Row]) -> None:
        """Records that the tokens of the rows are in the cache."""
        for request, num_tokens in rows:
            request.num_cached += num_tokens

    def end(self, request: Request) -> None:
        """Ends a live request and frees its pages."""
        self.live.remove(request)
        self.allocator.free(request.pages)
        request.pages = []

    def _grow(self, request: Request, num_tokens: int) -> None:
        missing = pages_for(num_tokens, self.page_size) - len(request.pages)
        request.pages += self.allocator.allocate(missing)


def pages_for(num_tokens: int, page_size: int) -> int:
    """Returns how many pages hold so many tokens: 17 tokens take 2 pages of 16."""
    return -(-num_tokens // page_size)

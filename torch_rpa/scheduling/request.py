"""What the scheduler knows about a request."""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Sequence

NO_PAGE = -1


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt and what has been generated for it.

    Attributes:
        tokens: Token ids: the prompt, and what is known of the text after it.
        max_new_tokens: Most tokens to generate.
        num_prompt: How many of the tokens are the prompt.
        pages: Pages that hold its keys and values, in order of position. Those of
            positions that a sliding window has left are given back: the first ones are
            ``NO_PAGE`` then.
        num_cached: Leading tokens whose keys and values are in the pages, once the
            steps planned so far have run.
        num_pending: Tokens after those, which steps planned so far generate.
        pending_row: The row of the latest step that generates one.
        num_shared: Leading tokens that were found in the cache, not computed, when
            the request last started.
        num_left: Leading pages that were given back.
        num_published: Leading pages that others may share.
        num_preemptions: How often it lost its pages.
        uses_prefixes: Whether it may take pages that others have computed.
        leader: A request with the same prompt. This one starts when that one's prompt
            is computed, and so shares its pages.
    """

    tokens: list[int]
    max_new_tokens: int
    num_prompt: int = dataclasses.field(init=False)
    pages: list[int] = dataclasses.field(default_factory=list)
    num_cached: int = 0
    num_pending: int = 0
    pending_row: int = 0
    num_shared: int = 0
    num_left: int = 0
    num_published: int = 0
    num_preemptions: int = 0
    uses_prefixes: bool = True
    leader: Request | None = None
    _page_keys: list[bytes] = dataclasses.field(default_factory=list)
    _first_key: bytes = b""

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        if not self.tokens:
            raise ValueError("prompt must have at least one token, got 0")
        if self.max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens must be at least 1, got {self.max_new_tokens}"
            )

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt."""
        return self.tokens[: self.num_prompt]

    @property
    def generated(self) -> list[int]:
        """Token ids after the prompt."""
        return self.tokens[self.num_prompt :]

    @property
    def num_generated(self) -> int:
        """Known tokens after the prompt."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncached(self) -> int:
        """Tokens that are not in the cache yet, pending ones included."""
        return len(self.tokens) + self.num_pending - self.num_cached

    @property
    def held_pages(self) -> list[int]:
        """Pages that it holds, in order of position."""
        return self.pages[self.num_left :]

    def page_table(self) -> list[int]:
        """Returns a page for each position; one of its own where it has none.

        What is there is not seen, but it may be read.
        """
        return self.held_pages[:1] * self.num_left + self.held_pages

    def leave_pages(self, count: int) -> list[int]:
        """Forgets the first pages, up to ``count`` of all; returns those forgotten."""
        left = self.pages[self.num_left : count]
        self.pages[self.num_left : count] = [NO_PAGE] * len(left)
        self.num_left += len(left)
        return left

    def append(self, token: int) -> None:
        """Adds the token that has been pending for longest."""
        self.tokens.append(token)
        self.num_pending -= 1

    def forget_pages(self) -> None:
        """Goes back to what is known for certain: tokens, and none of them cached."""
        self.pages = []
        self.num_cached = self.num_published = self.num_pending = self.num_left = 0

    def page_keys(self, page_size: int, first_key: bytes = b"") -> Sequence[bytes]:
        """Returns a key for each page that the known tokens fill.

        A key stands for all tokens up to the end of its page: it is the digest of the
        key before it and of the page's own tokens.

        Args:
            page_size: Tokens in a page, always the same.
            first_key: What stands before the key of the first page.
        """
        if first_key != self._first_key:
            self._page_keys, self._first_key = [], first_key
        for page in range(len(self._page_keys), len(self.tokens) // page_size):
            before = self._page_keys[-1] if self._page_keys else first_key
            tokens = self.tokens[page * page_size : (page + 1) * page_size]
            data = before + array("q", tokens).tobytes()
            self._page_keys.append(hashlib.blake2b(data, digest_size=16).digest())
        return self._page_keys

"""Which tokens of which requests a step computes, and the pages that they need."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

from torch_rpa.scheduling.page_allocator import OutOfPagesError, PageAllocator
from torch_rpa.scheduling.request import Request


class Row(NamedTuple):
    """The part of a step that belongs to one request."""

    request: Request
    start: int  # position of its first new token
    num_tokens: int  # new tokens
    is_last: bool  # whether it ends with the last token, so that it generates one
    pending_row: int | None  # row of the step before that generates its last token

    @property
    def end(self) -> int:
        """Tokens of the request in the cache after this step."""
        return self.start + self.num_tokens


class Scheduler:
    """Plans steps over all requests, under a budget of tokens for each.

    A step takes, in this order: one token of every running request that waits with a
    single one (decode); as much as fits of the prompts begun before; new prompts, in
    order of arrival. With a budget of 8 and prompts of 5, 1 and 9 tokens::

        first step   5 (first)  1 (second)  2 (third)   ->  rows  1 5 2
        second       1          1           6
        third        1          1           1

    A new request gets pages for its whole prompt at once, those with the same contents
    shared with earlier ones. Decoding adds pages one by one. When none is left, the
    requests that started last give theirs up and wait, ahead of all new ones, to be
    computed again. The first always gets what it needs, so that every request ends.

    Attributes:
        waiting: Requests without pages, in the order in which they will start.
        running: Requests with pages, in the order in which they started.
        model_key: Stands for the model that computes what is in the pages.
        num_preemptions: How often a request had to give its pages up.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        *,
        page_size: int,
        max_num_sequences: int,
        max_tokens_per_step: int,
        prefix_caching: bool = True,
        lookahead: bool = True,
        window: int | None = None,
    ):
        """Makes a scheduler without requests.

        Args:
            allocator: The pages of the cache.
            page_size: Tokens in a page.
            max_num_sequences: Most running requests.
            max_tokens_per_step: Most tokens in a step.
            prefix_caching: Share full pages between requests with the same beginning.
            lookahead: Plan for a generated token before it is known.
            window: No token sees more than so many, itself included: pages that are
                farther back are given back. None keeps all.
        """
        if max_num_sequences < 1:
            raise ValueError(
                f"max_num_sequences must be at least 1, got {max_num_sequences}"
            )
        if max_tokens_per_step < max_num_sequences:
            raise ValueError(
                "max_tokens_per_step must be at least one for each of the "
                f"{max_num_sequences} sequences, got {max_tokens_per_step}"
            )
        self.allocator = allocator
        self.page_size = page_size
        self.max_num_sequences = max_num_sequences
        self.max_tokens_per_step = max_tokens_per_step
        self.prefix_caching = prefix_caching
        self.lookahead = lookahead
        self.window = window
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.model_key = b""
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        """Appends a request to those that wait.

        Raises:
            OutOfPagesError: It needs more pages than there are, even if it runs alone.
        """
        # The last token is generated and never cached.
        num_tokens = request.num_prompt + request.max_new_tokens - 1
        num_pages = pages_for(num_tokens, self.page_size)
        if num_pages > self.allocator.num_pages:
            raise OutOfPagesError(
                f"{request.num_prompt} prompt tokens and {request.max_new_tokens} new "
                f"ones need {num_pages} pages, got {self.allocator.num_pages} in all: "
                "raise num_pages, or shorten prompt or max_new_tokens"
            )
        self.waiting.append(request)

    def schedule(self, among: Container[Request] | None = None) -> list[Row]:
        """Plans the next step: rows with one token first, then the longer ones.

        Every row's request has pages for its new tokens, and counts them as cached: the
        step must run before any that is planned later.

        Args:
            among: Which waiting requests may start; None is all.

        Returns:
            The rows; none if nothing can be computed now.
        """
        for request in self.running:
            self._publish_full_pages(request)
            self._leave_pages(request)
        num_preemptions = self.num_preemptions
        sizes: dict[Request, int] = {}
        for request in list(self.running):
            if self._num_ready(request) == 1 and self._grow(request):
                sizes[request] = 1
        budget = self.max_tokens_per_step - len(sizes)
        for request in self.running:
            size = min(self._num_ready(request), budget)
            if size and request not in sizes:
                sizes[request] = size
                budget -= size
        if num_preemptions == self.num_preemptions:
            while budget and self._start_next(among):
                request = self.running[-1]
                num_known = len(request.tokens) - request.num_cached
                sizes[request] = min(num_known, budget)
                budget -= sizes[request]
        # Stable: requests keep their order within each group.
        ordered = sorted(sizes.items(), key=lambda item: item[1] > 1)
        return [self._row(index, *item) for index, item in enumerate(ordered)]

    def end(self, request: Request, *, is_sound: bool = True) -> None:
        """Removes a request, wherever it is, and frees its pages.

        Args:
            request: Running or waiting.
            is_sound: Whether others may go on sharing what it has in its pages.
        """
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)
        if not is_sound:
            for key in self._page_keys(request):
                self.allocator.forget(key)

    def change_model(self, key: bytes) -> None:
        """Has every request computed again, since the model is another from now on.

        All planned steps must have run. What they left in pages is found again if the
        former model comes back.
        """
        while self.running:
            self._preempt(self.running[-1])
        self.model_key = key

    def restart(self, requests: Iterable[Request]) -> None:
        """Takes all pages back, and forgets steps that are planned and prefixes.

        It is right whatever state an interrupted call has left.

        Args:
            requests: Those that wait from now on, in this order.
        """
        self.allocator.reset()
        self.running.clear()
        self.waiting = deque(requests)
        for request in self.waiting:
            if request.pages:
                request.num_preemptions += 1
                self.num_preemptions += 1
            request.forget_pages()

    def _num_ready(self, request: Request) -> int:
        """Tokens of a request that a step may compute now; 0 if it is preempted."""
        if not request.pages:
            return 0
        num_generated = request.num_generated + request.num_pending
        goes_on = self.lookahead and num_generated < request.max_new_tokens
        return request.num_uncached if goes_on or not request.num_pending else 0

    def _row(self, index: int, request: Request, num_tokens: int) -> Row:
        is_last = num_tokens == request.num_uncached
        row = Row(
            request,
            request.num_cached,
            num_tokens,
            is_last,
            request.pending_row if is_last and request.num_pending else None,
        )
        request.num_cached = row.end
        if is_last:
            request.pending_row = index
            request.num_pending += 1
        return row

    def _grow(self, request: Request) -> bool:
        """Gets a page for one more token; False if it had to give up its own."""
        missing = pages_for(request.num_cached + 1, self.page_size)
        missing -= len(request.pages)
        while missing > self.allocator.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        request.pages += self.allocator.allocate(missing)
        return True

    def _preempt(self, request: Request) -> None:
        # First, so that whatever interrupts this, it is still one that can be ended.
        self.waiting.appendleft(request)
        self.running.remove(request)
        self._release(request)
        request.num_preemptions += 1
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        self._publish_full_pages(request)
        self.allocator.free(request.held_pages)
        request.pages = []
        request.num_cached = request.num_published = request.num_left = 0

    def _start_next(self, among: Container[Request] | None) -> bool:
        """Starts the first waiting request that may, if there is room for it."""
        if len(self.running) == self.max_num_sequences:
            return False
        allowed = (
            r
            for r in self.waiting
            if (among is None or r in among) and not self._waits_for_leader(r)
        )
        request = next(allowed, None)
        if request is None:
            return False
        shared = self._cached_prefix(request)
        missing = pages_for(len(request.tokens), self.page_size) - len(shared)
        self.allocator.hold(shared)
        if missing > self.allocator.num_free:
            self.allocator.free(shared)
            return False
        self.waiting.remove(request)
        self.running.append(request)
        request.pages = shared + self.allocator.allocate(missing)
        request.num_published = len(shared)
        request.num_cached = request.num_shared = len(shared) * self.page_size
        return True

    def _waits_for_leader(self, request: Request) -> bool:
        leader = request.leader
        return (
            leader is not None
            and self.prefix_caching
            and leader in self.running
            and leader.num_cached < leader.num_prompt
        )

    def _cached_prefix(self, request: Request) -> list[int]:
        """Returns cached pages with the first tokens, but never with the last one.

        The last token must be computed, since what follows it is wanted; its keys and
        values are written again, to a page that nobody shares.
        """
        pages: list[int] = []
        if not (self.prefix_caching and request.uses_prefixes):
            return pages
        most = (len(request.tokens) - 1) // self.page_size
        for key in self._page_keys(request)[:most]:
            page = self.allocator.lookup(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def _leave_pages(self, request: Request) -> None:
        """Gives back the pages that no later step of a request will see.

        Steps that were planned before still read them. But those run before any step
        that is planned from now on, and so before anybody else writes there.
        """
        if self.window is None:
            return
        num_left = (request.num_cached - self.window + 1) // self.page_size
        if self.prefix_caching:  # others may still want what is in them
            num_left = min(num_left, request.num_published)
        if num_left > request.num_left:
            self.allocator.free(request.leave_pages(num_left))

    def _publish_full_pages(self, request: Request) -> None:
        """Lets later steps share what the steps planned so far have filled."""
        if not self.prefix_caching:
            return
        keys = self._page_keys(request)
        # The last keys may belong to tokens that are not in the cache yet, and the last
        # cached token may be one that is not known yet.
        num_full = min(request.num_cached // self.page_size, len(keys))
        for index in range(request.num_published, num_full):
            self.allocator.publish(request.pages[index], keys[index])
        request.num_published = num_full

    def _page_keys(self, request: Request) -> Sequence[bytes]:
        return request.page_keys(self.page_size, self.model_key)


def pages_for(num_tokens: int, page_size: int) -> int:
    """Returns how many pages hold so many tokens: 17 tokens take 2 pages of 16."""
    return -(-num_tokens // page_size)

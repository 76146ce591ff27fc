"""Which pages of the cache are free, in use, or kept for a prefix that may return."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence


class OutOfPagesError(RuntimeError):
    """The cache has too few pages for the sequences in it."""


class PageAllocator:
    """Hands out pages, counts who holds them, and finds full pages by their contents.

    A page is in one of three states::

        free     nobody holds it, its contents are worthless
        held     by one request or more; only a page with a key is held by more
        cached   nobody holds it, but it has a key: ``lookup`` may bring it back, and
                 ``allocate`` takes the one that was freed longest ago when no page
                 is free

    Attributes:
        num_pages: Pages in the pool; ids are ``0 .. num_pages - 1``.
    """

    def __init__(self, num_pages: int):
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self.reset()

    def reset(self) -> None:
        """Makes every page free, whoever holds it, and forgets what is in it."""
        self._never_held = range(self.num_pages)  # no list: there may be very many
        self._free: list[int] = []
        self._holders: Counter[int] = Counter()
        self._cached: OrderedDict[int, None] = OrderedDict()  # longest ago first
        self._page_of_key: dict[bytes, int] = {}
        self._key_of_page: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be allocated: free and cached ones."""
        return len(self._free) + len(self._never_held) + len(self._cached)

    @property
    def num_held(self) -> int:
        """Pages that at least one request holds."""
        return self.num_pages - self.num_free

    def num_holders(self, page: int) -> int:
        """Returns how many requests hold a page."""
        return self._holders[page]

    def has_key(self, page: int) -> bool:
        """Whether a page may be shared, so that nobody may write to it."""
        return page in self._key_of_page

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` pages for one holder, or raises OutOfPagesError and none."""
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        if count > self.num_free:
            raise OutOfPagesError(
                f"{count} more pages are needed and {self.num_free} of {self.num_pages}"
                " are free: raise num_pages, or ask for fewer or shorter sequences at "
                "once"
            )
        pages = [self._take() for _ in range(count)]
        self._holders.update(pages)
        return pages

    def hold(self, pages: Sequence[int]) -> None:
        """Adds a holder to pages that ``lookup`` found."""
        for page in pages:
            if page not in self._key_of_page:
                raise ValueError(f"pages must have a key to be shared, got {page}")
            self._cached.pop(page, None)
            self._holders[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """Removes one holder of each page; a page without any is free or cached.

        Args:
            pages: In order of position. The last ones are the first to be reused, for
                a prefix is of use without its end but not without its beginning.
        """
        for page in reversed(pages):
            if not self._holders[page]:
                raise ValueError(f"pages must be in use to be freed, got {page}")
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._key_of_page:
                self._cached[page] = None
            else:
                self._free.append(page)

    def publish(self, page: int, key: bytes) -> None:
        """Lets ``lookup`` find a full page, unless another has the same contents.

        Args:
            page: Held by its only writer, which will not write to it again.
            key: Stands for the tokens in the page and all tokens before them.
        """
        if key not in self._page_of_key and page not in self._key_of_page:
            self._page_of_key[key] = page
            self._key_of_page[page] = key

    def lookup(self, key: bytes) -> int | None:
        """Returns the page with these contents, or None."""
        return self._page_of_key.get(key)

    def forget(self, key: bytes) -> None:
        """Makes sure that ``lookup`` does not find a page with these contents."""
        page = self._page_of_key.pop(key, None)
        if page is None:
            return
        del self._key_of_page[page]
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        if self._never_held:
            page, self._never_held = self._never_held[0], self._never_held[1:]
            return page
        page, _ = self._cached.popitem(last=False)
        del self._page_of_key[self._key_of_page.pop(page)]
        return page

"""Which pages of the cache are free, and which are in use."""

from __future__ import annotations

from collections.abc import Iterable


class OutOfPagesError(RuntimeError):
    """The cache has too few pages for the sequences in it."""


class PageAllocator:
    """Hands out page ids from a free list, the most recently freed first.

    Attributes:
        num_pages: Pages in the pool; ids are ``0 .. num_pages - 1``.
    """

    def __init__(self, num_pages: int):
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self._free = list(reversed(range(num_pages)))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        """Pages that can still be allocated."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` pages, or raises OutOfPagesError and takes none."""
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        if count > self.num_free:
            raise OutOfPagesError(
                f"{count} more pages are needed and {self.num_free} of {self.num_pages}"
                " are free: raise num_pages (--num-pages), or ask for fewer or shorter "
                "sequences at once (--prompt, --max-new-tokens)"
            )
        pages = [self._free.pop() for _ in range(count)]
        self._used.update(pages)
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Gives pages back; each must be in use."""
        for page in pages:
            if page not in self._used:
                raise ValueError(f"pages must be in use to be freed, got {page}")
            self._used.remove(page)
            self._free.append(page)

"""Follows every write to every page of an engine, and checks who may do what."""

from collections import Counter

from torch_rpa.scheduling import Row, Scheduler


class BrokenPages(BaseException):
    """A page is not as it must be; no ``Exception``, which an engine would survive."""


class PageAudit:
    """Checks each step that a scheduler plans, from the first on.

    Attributes:
        num_rows: Rows checked.
        num_foreign_reads: Pages read that another request had written.
    """

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.num_rows = self.num_foreign_reads = 0
        self._slots = {}  # (page, slot) to the request and position written there
        schedule, restart = scheduler.schedule, scheduler.restart

        def audited(among=None):
            rows = schedule(among)
            try:
                self._check_rows(rows)
                self.check_holders()
            except (AssertionError, LookupError) as error:
                raise BrokenPages from error
            return rows

        def audited_restart(requests):
            restart(requests)
            self._slots.clear()  # whoever reads a slot must have written it since

        scheduler.schedule, scheduler.restart = audited, audited_restart

    def check_holders(self) -> None:
        """Every page is held by those who have it in their table, and nobody else."""
        scheduler, allocator = self.scheduler, self.scheduler.allocator
        assert not any(request.pages for request in scheduler.waiting)
        holders = Counter(page for r in scheduler.running for page in r.held_pages)
        pages = range(allocator.num_pages)
        assert [allocator.num_holders(p) for p in pages] == [holders[p] for p in pages]
        assert allocator.num_held == len(holders)
        free = [*allocator._free, *allocator._never_held]
        states = [*free, *allocator._cached, *holders]
        assert sorted(states) == list(pages)  # each page in exactly one state
        for request in scheduler.running:
            assert len(set(request.held_pages)) == len(request.held_pages)

    def _check_rows(self, rows: list[Row]) -> None:
        scheduler = self.scheduler
        assert sum(row.num_tokens for row in rows) <= scheduler.max_tokens_per_step
        assert len(rows) <= scheduler.max_num_sequences
        assert len({row.request for row in rows}) == len(rows)
        is_long = [row.num_tokens > 1 for row in rows]
        assert is_long == sorted(is_long)
        written = set()
        for row in rows:
            assert 0 <= row.start < row.end
            assert row.request in scheduler.running
            for position in range(row.start, row.end):
                page, slot = self._slot(row, position)
                assert (page, slot) not in written
                assert scheduler.allocator.num_holders(page) == 1
                assert not scheduler.allocator.has_key(page)
                written.add((page, slot))
                self._slots[page, slot] = row.request, position
        for row in rows:
            self._check_reads(row)
        self.num_rows += len(rows)

    def _check_reads(self, row: Row) -> None:
        """The keys and values that a row sees are those of its own tokens."""
        window = self.scheduler.window
        first = 0 if window is None else max(row.start - window + 1, 0)
        for position in range(first, row.end):
            writer, written_position = self._slots[self._slot(row, position)]
            assert written_position == position
            if writer is not row.request and (
                (position + 1) % self.scheduler.page_size == 0
            ):
                self.num_foreign_reads += 1
                end = position + 1
                assert writer.tokens[:end] == row.request.tokens[:end]

    def _slot(self, row: Row, position: int) -> tuple[int, int]:
        page, slot = divmod(position, self.scheduler.page_size)
        return row.request.pages[page], slot

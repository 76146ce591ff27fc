"""Which request makes a step fail: groups of them run, ever smaller ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Sequence

from torch_rpa.scheduling import Request


class Trials:
    """Groups of requests that have to show, one group after the other, that they run.

    An error rarely says whose fault it is, and a step that has failed once may fail
    again with the same requests. So they run in two halves. A half that fails is halved
    again, and a request that fails alone is the culprit. A group is through when each
    of its requests has got a token or ended. If every group gets through, all run
    together again: the error was gone, or a matter of all of them, such as memory, and
    each has got a token further.
    """

    def __init__(self) -> None:
        # How many tokens each request had when the group was made.
        self._groups: deque[dict[Request, int]] = deque()

    @property
    def group(self) -> Container[Request] | None:
        """The requests that may run now; None is all."""
        return self._groups[0] if self._groups else None

    @property
    def requests(self) -> list[Request]:
        """The requests of the group; none if there is no group."""
        return list(self._groups[0]) if self._groups else []

    def split(self, requests: Sequence[Request]) -> None:
        """Puts the requests of a failed step first, in place of the group they are of.

        Args:
            requests: Those that have not ended. A single one is a group as well.
        """
        if self._groups:
            self._groups.popleft()
        middle = (len(requests) + 1) // 2
        for half in (requests[middle:], requests[:middle]):
            if half:
                self._groups.appendleft({r: r.num_generated for r in half})

    def is_through(self, unfinished: Container[Request]) -> bool:
        """Whether there is a group, and all of it has got a token or ended."""
        return bool(self._groups) and not any(
            request in unfinished and request.num_generated == before
            for request, before in self._groups[0].items()
        )

    def go_on(self) -> bool:
        """Ends the group; returns whether there is another one."""
        self._groups.popleft()
        return bool(self._groups)

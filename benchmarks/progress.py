"""Says on standard error what is being compiled and how long the rest may take."""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

CLEAR_LINE = "\r\x1b[K"


class Progress:
    """Of a number of programs, each compiled once and then executed some times.

    On a terminal, one line is kept up to date while work is in progress, and removed
    when it ends, so that results can be printed. Elsewhere a line is printed when a
    program is begun.

    Args:
      total: Number of programs.
      stream: Where to, standard error unless given.
      clock: Seconds.
    """

    def __init__(
        self,
        total: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total = total
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._clock = clock
        self._begin = clock()
        self._seconds: list[float] = []  # worked on each program, the present one last

    @contextlib.contextmanager
    def compiling(self, name: str) -> Iterator[None]:
        """While the next program is compiled."""
        self._seconds.append(0.0)
        what = f"compiling {name}"
        if not self._is_terminal:
            now = self._clock()
            self._write(self._line(what, now, since=now) + "\n")
        with self._working(what):
            yield

    @contextlib.contextmanager
    def executing(self, name: str) -> Iterator[None]:
        """While the present program is executed."""
        with self._working(f"executing {name}"):
            yield

    def _line(self, what: str, now: float, since: float) -> str:
        number = f"program {len(self._seconds)} of {self._total}"
        elapsed = _minutes(now - self._begin)
        return f"{number}, {what}: {elapsed} so far{self._rest(now - since)}"

    def _rest(self, present: float) -> str:
        """What the programs so far lead to expect, in words."""
        *finished, begun = self._seconds
        if not finished:
            return ""
        each = sum(finished) / len(finished)
        rest = max(0.0, each - begun - present)
        rest += each * max(0, self._total - len(self._seconds))
        return f", about {_minutes(rest)} left"

    @contextlib.contextmanager
    def _working(self, what: str) -> Iterator[None]:
        since = self._clock()

        def write() -> None:
            line = self._line(what, self._clock(), since)
            # A line that is broken could not be removed.
            self._write(CLEAR_LINE + line[: shutil.get_terminal_size().columns - 1])

        try:
            with contextlib.ExitStack() as shown:
                if self._is_terminal:
                    shown.callback(self._write, CLEAR_LINE)
                    shown.enter_context(every_second(write))
                yield
        finally:
            self._seconds[-1] += self._clock() - since

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


@contextlib.contextmanager
def every_second(action: Callable[[], None]) -> Iterator[None]:
    """Does something at once, and then every second in a thread of its own."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(1):
            action()

    action()
    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _minutes(seconds: float) -> str:
    """Such as 0:07 or 1:02:30."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

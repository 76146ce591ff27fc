"""What is said while programs are compiled."""

import contextlib
import io

import pytest

from benchmarks import compare, host, measure, predict, sweep, tune
from benchmarks.progress import CLEAR_LINE, Progress
from benchmarks.serving import __main__ as serving


class Clock:
    """Moves only when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(shown: Progress, clock: Clock, name: str, *seconds: float) -> None:
    """Compiles for the first time and executes for the others."""
    compiling, *executing = seconds
    with shown.compiling(name):
        clock.now += compiling
    for count in executing:
        with shown.executing(name):
            clock.now += count


def test_a_plain_line_for_each_program_without_a_terminal():
    clock, stream = Clock(), io.StringIO()
    shown = Progress(3, stream, clock)
    work(shown, clock, "a and 2 more", 40, 5, 5)
    clock.now += 7  # what others do meanwhile counts as elapsed, not as work
    work(shown, clock, "b", 70)
    work(shown, clock, "c", 1)
    assert stream.getvalue().splitlines() == [
        "program 1 of 3, compiling a and 2 more: 0:00 so far",
        "program 2 of 3, compiling b: 0:57 so far, about 1:40 left",
        "program 3 of 3, compiling c: 2:07 so far, about 1:00 left",
    ]


def test_hours_are_told():
    clock, stream = Clock(), io.StringIO()
    shown = Progress(3, stream, clock)
    work(shown, clock, "a", 3700)
    work(shown, clock, "b", 10)
    assert "b: 1:01:40 so far, about 2:03:20 left" in stream.getvalue()


def test_more_than_expected_leaves_nothing_for_the_present_program():
    clock, stream = Clock(), Terminal()
    shown = Progress(2, stream, clock)
    work(shown, clock, "a", 10)
    work(shown, clock, "b", 500, 1)
    last = [line for line in stream.getvalue().split(CLEAR_LINE) if line][-1]
    assert last == "program 2 of 2, executing b: 8:30 so far, about 0:00 left"


def test_the_line_of_a_terminal_is_gone_when_work_ends():
    clock, stream = Clock(), Terminal()
    shown = Progress(1, stream, clock)
    work(shown, clock, "a", 10, 1)
    lines = stream.getvalue().split(CLEAR_LINE)
    assert [line for line in lines if line] == [
        "program 1 of 1, compiling a: 0:00 so far",
        "program 1 of 1, executing a: 0:10 so far",
    ]
    assert stream.getvalue().endswith(CLEAR_LINE)


def test_the_line_is_gone_after_an_error_too():
    stream = Terminal()
    with (
        pytest.raises(RuntimeError, match="no memory"),
        Progress(1, stream).compiling("a"),
    ):
        raise RuntimeError("no memory")
    assert stream.getvalue().endswith(CLEAR_LINE)


@pytest.mark.parametrize(
    ("main", "defaults"),
    [
        (predict.main, ("tpu7x", "32", "8", "128", "bfloat16", "1.0", "0.0", "0.92")),
        (compare.main, ("tpu7x", "32", "8", "128", "bfloat16")),
        (sweep.main, ("tpu7x",)),
        (host.main, ("200", "10", "8")),
        (serving.main, ("32", "96", "6", "16", "3", "1")),
        (tune.main, ("1", "tune.jsonl", "32", "8", "128", "bfloat16")),
        (measure.main, ("3", "20", "8", "32", "128", "bfloat16")),
    ],
)
def test_help_shows_defaults(main, defaults, capsys):
    with contextlib.suppress(SystemExit):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for default in defaults:
        assert f"(default: {default})" in told
    assert "default: None" not in told
    assert "default: False" not in told

"""Where JAX keeps the state of Pallas TPU interpret mode: it differs by release.

Interpret mode has no public way to ask what a kernel left behind. The checks of
``interpret.py`` see its memory through the functions here.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from jax._src import source_info_util

_PACKAGE = "jax._src.pallas.mosaic.interpret"
# One module until 0.7, then a package.
_IS_ONE_MODULE = jax.__version_info__ < (0, 8)
# Vector clocks were arrays until 0.11.1, then objects that hold an array.
_CLOCKS_ARE_ARRAYS = jax.__version_info__ < (0, 11, 1)

_interpreter: Any = importlib.import_module(
    _PACKAGE if _IS_ONE_MODULE else f"{_PACKAGE}.interpret_pallas_call"
)
_clocks: Any = (
    _interpreter
    if _IS_ONE_MODULE
    else importlib.import_module(f"{_PACKAGE}.vector_clock")
)

# Options with which a race is noted and the kernel goes on, as in releases before 0.12.
GOES_ON_AFTER_A_RACE: dict[str, Any] = (
    {} if jax.__version_info__ < (0, 12) else {"on_race": "warn"}
)

reset: Callable[[], None] = _interpreter.reset_tpu_interpret_mode_state


class LeftSemaphore(NamedTuple):
    """A semaphore when the kernel ends.

    Attributes:
      id: Its number.
      counts: i32[cores]
    """

    id: int
    counts: np.ndarray


@contextlib.contextmanager
def watched(at_exit: Callable[[], None]) -> Iterator[None]:
    """Calls ``at_exit`` when a kernel ends, while its memory is there."""
    clear = _interpreter._clear_shared_memory

    def look_and_clear() -> None:
        """Stands in for what the interpreter does last of all for each kernel."""
        at_exit()
        clear()

    with (
        mock.patch.object(_interpreter, "_clear_shared_memory", look_and_clear),
        _quick_order_of_clocks(),
    ):
        yield


def found_races() -> bool:
    """Whether the race detector found one in the present kernel."""
    return _interpreter.races.races_found


def semaphores() -> Iterator[LeftSemaphore]:
    """The semaphores of the present kernel."""
    for semaphore in _all_semaphores():
        counts = semaphore.counts if _IS_ONE_MODULE else semaphore.count_by_core
        yield LeftSemaphore(semaphore.id, counts)


def copies_not_carried_out() -> Iterator[str]:
    """Where copies were started that wait for somebody to wait for them."""
    for copy in _queued_copies():
        if copy.state is not _interpreter.DmaState.COMPLETED:
            yield source_info_util.summarize(copy.source_info)


def _all_semaphores() -> Iterator[Any]:
    memory = _interpreter._shared_memory
    yield from memory.sem.values()
    if not _IS_ONE_MODULE:
        yield from memory.fixed_id_sem.values()


def _queued_copies() -> Iterator[Any]:
    memory = _interpreter._shared_memory
    if _IS_ONE_MODULE:
        for queue in memory.dmas_by_sem.values():
            yield from queue
        return
    for semaphore in memory.sem.values():
        for task in (task for tasks in semaphore.tasks for task in tasks):
            yield task.__self__  # the task is a method of the copy


def _quick_order_of_clocks():
    """The race detector with ``are_ordered`` in place of its own."""
    if _CLOCKS_ARE_ARRAYS:
        return mock.patch.object(_clocks, "ordered", are_ordered)
    return mock.patch.object(
        _clocks.NpVectorClock,
        "ordered",
        lambda own, other: are_ordered(own.clock, other.clock),
    )


def are_ordered(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether one vector clock happened before the other.

    The same as ``ordered_by_jax``, which takes four numpy reductions for two numbers.
    It is asked about every earlier access, and took most of the time.
    """
    pairs = list(zip(x.tolist(), y.tolist(), strict=True))
    is_less = any(a < b for a, b in pairs)
    is_more = any(a > b for a, b in pairs)
    return is_less != is_more


def ordered_by_jax(x: np.ndarray, y: np.ndarray) -> bool:
    """What JAX's own race detector says."""
    if _CLOCKS_ARE_ARRAYS:
        return _clocks.ordered(x, y)
    clocks = [_clocks.NpVectorClock(len(x)) for _ in range(2)]
    for clock, numbers in zip(clocks, (x, y), strict=True):
        clock.clock[:] = numbers
    return clocks[0].ordered(clocks[1])

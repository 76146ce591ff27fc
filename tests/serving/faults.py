"""Errors at random in the middle of steps."""

import contextlib
import inspect
import pathlib
import random
import sys

import torch_rpa

_FOLDER = str(pathlib.Path(torch_rpa.__file__).parent)


class InjectedFault(RuntimeError):
    """What a broken device, a full memory or a fault of ours may raise."""


class Faults:
    """Makes some steps of an engine raise, at the beginning or end of any call in them.

    Attributes:
        places: Name of each function of a step, and whether it begins; to the number of
            faults there.
    """

    def __init__(self, engine, seed, *, share=0.4):
        """Arms an engine.

        Args:
            engine: This package's own functions raise while it plans, starts and reads
                a step, but not while it makes itself whole again.
            seed: Of the random choices.
            share: Which part of the steps shall raise. The place is one of those that
                were seen before, each as likely as any other.
        """
        self.places = {}
        self._random = random.Random(seed)
        self._share = share
        self._advance = engine._advance
        engine._advance = self._faulty_advance

    def _faulty_advance(self):
        place = None
        if self.places and self._random.random() < self._share:
            place = self._random.choice(list(self.places))
        with self._fault_at(place, num_before=self._random.choice((0, 0, 1, 2, 5))):
            return self._advance()

    @contextlib.contextmanager
    def _fault_at(self, place, num_before):
        """Raises at one call or return; Python stops tracing when it does."""

        def trace(frame, event, argument):
            nonlocal num_before
            code = frame.f_code
            # What a generator raises when it is closed goes to nobody.
            if not code.co_filename.startswith(_FOLDER) or (
                code.co_flags & inspect.CO_GENERATOR
            ):
                return None
            frame.f_trace_lines = False
            here = code.co_qualname, event == "call"
            self.places.setdefault(here, 0)
            if here == place:
                if num_before == 0:
                    self.places[here] += 1
                    raise InjectedFault(f"{event} of {code.co_qualname}")
                num_before -= 1
            return trace

        former = sys.gettrace()
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(former)

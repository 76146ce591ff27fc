"""What every bridge has to define."""

import inspect
from typing import Any

from torch_rpa import bridges


def assert_is_bridge(bridge: Any) -> None:
    """Compares a module with :class:`torch_rpa.bridges.Bridge`, parameters included."""
    assert isinstance(bridge, bridges.Bridge)
    for name, method in inspect.getmembers(bridges.Bridge, inspect.isfunction):
        if name.startswith("_"):
            continue
        _, *expected = inspect.signature(method).parameters.values()
        got = inspect.signature(getattr(bridge, name)).parameters.values()
        assert [(p.name, p.kind, p.default) for p in got] == [
            (p.name, p.kind, p.default) for p in expected
        ], name

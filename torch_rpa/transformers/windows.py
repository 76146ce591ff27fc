"""How far back a model looks."""

from __future__ import annotations

from typing import Any


def widest_window(config: Any) -> int | None:
    """Returns how many of the last tokens any layer sees, None if some sees all.

    Args:
        config: The text config of a model. Where it does not tell the kinds of layers,
            one window is that of all of them, as transformers makes one mask.
    """
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    layer_types = getattr(config, "layer_types", None)
    return None if set(layer_types or ()) - {"sliding_attention"} else window

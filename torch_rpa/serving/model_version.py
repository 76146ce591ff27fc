"""Whether a model still computes what it computed before."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn


class ModelVersion:
    """Tells the states of a model apart: its weights, and which adapters are on.

    A weight that is changed in place, as by an optimiser or ``load_state_dict``, or
    replaced, makes a new state. A write through ``weight.data`` cannot be seen. States
    of adapters are those of PEFT, and can come back.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._weights: list[tuple[weakref.ref[nn.Parameter], tuple[int, int]]] = []
        self._num_changes = 0

    def key(self) -> bytes:
        """Returns the same bytes as long as the model is the same."""
        parameters, adapters = [], []
        for module in self._model.modules():
            parameters += module._parameters.values()
            # Of the class: modules take long to say that they have no such attribute.
            if isinstance(getattr(type(module), "disable_adapters", None), property):
                adapters.append(_adapter_state(module))
        weights = [p for p in parameters if p is not None]
        if not self._is_known(weights):
            self._num_changes += 1
            self._weights = [(weakref.ref(p), _version(p)) for p in weights]
        return repr((self._num_changes, adapters)).encode()

    def _is_known(self, weights: list[nn.Parameter]) -> bool:
        # By reference: another weight may have the address of one that is gone.
        return len(weights) == len(self._weights) and all(
            known() is weight and version == _version(weight)
            for weight, (known, version) in zip(weights, self._weights, strict=True)
        )


def _version(weight: nn.Parameter) -> tuple[int, int]:
    """Returns numbers that change with the weight, where that can be seen."""
    # Other devices have no addresses; those of inference tensors count no versions.
    address = weight.data_ptr() if weight.device.type == "cpu" else 0
    return (0 if weight.is_inference() else weight._version), address


def _adapter_state(layer: Any) -> tuple[Any, ...]:
    """Returns what a tuner layer of PEFT does at the moment."""
    return (
        layer.disable_adapters,
        tuple(getattr(layer, "active_adapters", ())),
        tuple(getattr(layer, "merged_adapters", ())),
        sorted(getattr(layer, "scaling", {}).items()),
    )

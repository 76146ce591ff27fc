"""No kernel of the engine reads a cache that is not in its layout.

Models that tpu-inference has in Flax do not ask for a backend by its name: they call
the default one, or its kernel. Their cache has the shape of the backend that was
selected, and that may look like the other's. So the default backend becomes this one,
and the kernels refuse.
"""

# pyright: reportMissingImports=false
# tpu-inference has an environment of its own.

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from tpu_inference.layers.common.attention_backend import RPAAttentionBackend

_KERNELS = {
    "tpu_inference.kernels.ragged_paged_attention.v3.kernel": (
        "ragged_paged_attention",
    ),
    "tpu_inference.kernels.ragged_paged_attention.v3.kernel_hd64": (
        "ragged_paged_attention_hd64",
    ),
    "tpu_inference.kernels.experimental.batched_rpa.wrapper": (
        "ragged_paged_attention",
    ),
}


def replace_by(backend: Any) -> None:
    """Makes the engine's default backend call another one, once in a process.

    Args:
        backend: An ``AttentionBackend`` of tpu-inference.
    """
    if getattr(RPAAttentionBackend, "_replaced", False):
        return
    for name in ("attention", "get_kv_cache_shape"):
        setattr(RPAAttentionBackend, name, _calling(getattr(backend, name)))
    for module, names in _KERNELS.items():
        for name in names:
            _refuse(module, name)
    RPAAttentionBackend._replaced = True


def _calling(method: Callable) -> Callable:
    def call(self: Any, *args: Any, **options: Any) -> Any:
        del self
        return method(*args, **options)

    return call


def _refuse(module: str, name: str) -> None:
    """Replaces a kernel in its module and wherever it was imported to."""
    kernel = getattr(importlib.import_module(module), name)

    def refuse(*args: Any, **options: Any) -> NoReturn:
        raise NotImplementedError(
            f"{module}.{name} cannot read the cache of --attention-backend torch_rpa: "
            "this model calls it directly, so set MODEL_IMPL_TYPE=vllm"
        )

    for loaded in list(sys.modules.values()):
        if getattr(loaded, "__name__", "").startswith("tpu_inference."):
            for key, value in list(vars(loaded).items()):
                if value is kernel:
                    setattr(loaded, key, refuse)

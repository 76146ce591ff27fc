"""A stand-in of what the backend uses of tpu-inference, for where that is missing."""

from __future__ import annotations

import sys
import types
from typing import Any

from jax_kernels.integrations import tpu_inference as integration

KERNELS = "tpu_inference.kernels.ragged_paged_attention.v3"


def install(monkeypatch: Any) -> Any:
    """Puts modules of that name into sys.modules; returns them by short names.

    Modules of this project that import them are imported anew, and forgotten again.
    """
    made: dict[str, types.ModuleType] = {}

    def module(name: str, **members: Any) -> types.ModuleType:
        made[name] = types.ModuleType(name)
        vars(made[name]).update(members)
        monkeypatch.setitem(sys.modules, name, made[name])
        parent, _, child = name.rpartition(".")
        if parent:
            if parent not in made:
                module(parent)
            setattr(made[parent], child, made[name])
        return made[name]

    class AttentionBackend:
        """The engine's abstract class."""

    class RPAAttentionBackend(AttentionBackend):
        """The engine's own backend."""

        def get_kv_cache_shape(self, *sizes: Any) -> tuple:
            return "own", *sizes

        def attention(self, *arrays: Any, **options: Any) -> tuple:
            return "own", arrays, options

    registered: list = []
    backends = module(
        "tpu_inference.layers.common.attention_backend",
        AttentionBackend=AttentionBackend,
        RPAAttentionBackend=RPAAttentionBackend,
        register_attention_backend=lambda name, **given: registered.append(
            (name, given)
        ),
    )
    names = types.SimpleNamespace(ATTN_DATA="data", ATTN_HEAD="model")
    module("tpu_inference.layers.common.sharding", ShardingAxisName=names)
    envs = module("tpu_inference.envs", USE_BATCHED_RPA_KERNEL=False, PREFILL_SLICES="")
    module(
        "tpu_inference.core.disagg_utils",
        is_disagg_enabled=lambda: bool(vars(envs)["PREFILL_SLICES"]),
    )

    def kernel(*arrays: Any, **options: Any) -> str:
        return "own"

    def kernel_hd64(*arrays: Any, **options: Any) -> str:
        return "own"

    module(f"{KERNELS}.kernel", ragged_paged_attention=kernel)
    module(f"{KERNELS}.kernel_hd64", ragged_paged_attention_hd64=kernel_hd64)
    module(
        "tpu_inference.kernels.experimental.batched_rpa.wrapper",
        ragged_paged_attention=lambda: "own",
    )
    # A model that imported the kernel itself.
    model = module("tpu_inference.models.jax.tiny", attend=kernel)
    for name in ("backend", "other_kernels"):
        monkeypatch.delitem(
            sys.modules, f"{integration.__name__}.{name}", raising=False
        )
        monkeypatch.delattr(integration, name, raising=False)
    return types.SimpleNamespace(
        backends=backends,
        envs=envs,
        model=model,
        kernels=made,
        registered=registered,
    )

"""Compiles a call of tokamax's splash attention; ``calls`` starts it.

    PYTHON compile_splash.py DIRECTORY < request.json

``blocks`` has fields of the peer's ``SplashConfig``; without it the peer's default is
taken. Layouts are ``"HEAD_DIM_MINOR"`` or ``"SEQ_MINOR"``.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import here
import jax

PACKAGE = "tokamax._src.ops.experimental.tpu.splash_attention"


def config_of(module: Any, blocks: dict) -> Any:
    """The peer's configuration.

    Raises:
      ValueError: This release of the peer has no such field.
    """
    if not blocks:
        return module.SplashConfig.get_default()
    known = {field.name for field in dataclasses.fields(module.SplashConfig)}
    if not set(blocks) <= known:
        release = importlib.metadata.version("tokamax")
        raise ValueError(
            f"blocks: expected fields of tokamax {release}'s SplashConfig, got "
            f"{sorted(set(blocks) - known)}"
        )
    return module.SplashConfig(
        **{
            name: module.QKVLayout[value] if name.endswith("_layout") else value
            for name, value in blocks.items()
        }
    )


def call_of(request: dict) -> tuple[Callable, list]:
    """The function and its arguments, which have a batch dimension if there is more
    than one sequence.

    Raises:
      NotImplementedError: Splash attention has no such call.
    """
    lengths = {tuple(sequence) for sequence in request["sequences"]}
    batch, (length, kv_len) = len(request["sequences"]), request["sequences"][0]
    if len(lengths) > 1 or length != kv_len:
        raise NotImplementedError(
            "sequences: splash attention takes those of one length without cached "
            f"tokens, got {sorted(lengths)}"
        )
    # The outermost package imports all other kernels first.
    kernels = here.import_alone(f"{PACKAGE}.splash_attention_kernel")
    masks = here.import_alone(f"{PACKAGE}.splash_attention_mask")
    shape = (length, length)
    if request["window"] is not None:
        right = 0 if request["causal"] else None
        mask = masks.LocalMask(shape, (request["window"] - 1, right), 0)
    elif request["causal"]:
        mask = masks.CausalMask(shape)
    else:
        mask = masks.FullMask(shape)
    call = kernels.make_splash_mha_single_device(
        mask, config=config_of(kernels, request["blocks"])
    )

    def array(heads: int, head_dim: int):
        sizes = (heads, length, head_dim)
        return here.array(request["dtype"], *((batch, *sizes) if batch > 1 else sizes))

    arguments = [
        array(request["num_q_heads"], request["head_dim"]),
        array(request["num_kv_heads"], request["head_dim"]),
        array(request["num_kv_heads"], request["v_head_dim"]),
    ]
    return jax.vmap(call) if batch > 1 else call, arguments


def main() -> None:
    directory = Path(sys.argv[1])
    request = json.load(sys.stdin)
    device = here.device_of(request["topology"])
    call, arguments = call_of(request)
    kernels = here.kernels_of(device, call, *arguments)
    if request["compile"]:
        here.compile_for(device, call, *arguments)
    here.write_call(directory, request, kernels, ["tokamax"])


if __name__ == "__main__":
    main()

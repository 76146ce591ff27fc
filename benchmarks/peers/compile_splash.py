"""Compiles a call of tokamax's splash attention; ``calls`` starts it.

    PYTHON compile_splash.py DIRECTORY < request.json

``blocks`` has some of ``BLOCKS``; without it the peer's default is taken. ``layouts``
has a letter each for queries, keys and values: ``h`` if the head dimension is the minor
one, ``s`` if the sequence is. ``scheduler`` is the experimental one. A
``diagonal_grid`` skips what is above the diagonal in so many parts of a block.
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
BLOCKS = (
    "block_q",
    "block_kv",
    "block_kv_compute",
    "num_stacked_q_heads",
    "layouts",
    "scheduler",
    "diagonal_grid",
)
LAYOUTS = {"h": "HEAD_DIM_MINOR", "s": "SEQ_MINOR"}


def config_of(module: Any, blocks: dict) -> Any:
    """The peer's configuration.

    Raises:
      ValueError: Other blocks than ``BLOCKS``, or some that this release does not have.
    """
    if not blocks:
        return module.SplashConfig.get_default()
    if not set(blocks) <= set(BLOCKS):
        raise ValueError(f"blocks: expected some of {', '.join(BLOCKS)}, got {blocks}")
    given = dict(blocks)
    fields: dict[str, Any] = {}
    for name, letter in zip("qkv", given.pop("layouts", "hhh"), strict=True):
        fields[f"{name}_layout"] = module.QKVLayout[LAYOUTS[letter]]
    fields["use_experimental_scheduler"] = bool(given.pop("scheduler", False))
    if given.get("num_stacked_q_heads") == 1:  # earlier releases do not have it
        del given["num_stacked_q_heads"]
    if grid := given.pop("diagonal_grid", 0):
        fields |= {"qk_diag_skip": True, "sv_diag_skip": True, "qk_diag_grid": grid}
    fields |= given
    known = {field.name for field in dataclasses.fields(module.SplashConfig)}
    if not set(fields) <= known:
        release = importlib.metadata.version("tokamax")
        raise ValueError(
            f"blocks: SplashConfig of tokamax {release} has no "
            f"{', '.join(sorted(set(fields) - known))}, got {blocks}"
        )
    return module.SplashConfig(**fields)


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

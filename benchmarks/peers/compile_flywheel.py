"""Compiles a call of FlyWheel in an environment that has it; ``calls`` starts it.

    PYTHON compile_flywheel.py DIRECTORY < request.json

Fresh sequences of one length go to ``flash_attn_func``. Sequences with cached tokens go
to ``flash_attn_with_kvcache`` and its paged cache, all with one number of new tokens.
``blocks`` must be empty: the peer chooses its own.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import here
import numpy as np

PACKAGE = "flywheel_tpu"


def call_of(request: dict) -> tuple[Callable, list, dict]:
    """The function, its arguments, and the options of ``jax.jit``.

    Raises:
      NotImplementedError: The peer has no function for such a call.
    """
    q_lens, kv_lens = np.array(request["sequences"], np.int32).T
    if request["blocks"]:
        raise NotImplementedError(
            f"blocks: FlyWheel takes none from its callers, got {request['blocks']}"
        )
    if len(set(q_lens)) > 1:
        raise NotImplementedError(
            "sequences: FlyWheel takes one number of new tokens for all, got "
            f"{sorted(set(q_lens.tolist()))}"
        )
    if any(q_lens != kv_lens):
        return _cached_call(request, kv_lens - q_lens)
    if len(set(kv_lens)) > 1:
        raise NotImplementedError(
            "sequences: FlyWheel takes one length for all without a cache, got "
            f"{sorted(set(kv_lens.tolist()))}"
        )
    return _dense_call(request)


def _window(request: dict) -> tuple[int, int]:
    """Positions seen to the left and right of a query, -1 for all."""
    left = -1 if request["window"] is None else request["window"] - 1
    return left, 0 if request["causal"] else -1


def _dense_call(request: dict) -> tuple[Callable, list, dict]:
    array = functools.partial(here.array, request["dtype"])
    batch, length = len(request["sequences"]), request["sequences"][0][0]
    # The peer knows the mask of a causal call without a window by its own name.
    options = {"causal": request["causal"]}
    if request["window"] is not None:
        options["window_size"] = _window(request)
    kv_heads = request["num_kv_heads"]
    arguments = [
        array(batch, request["num_q_heads"], length, request["head_dim"]),
        array(batch, kv_heads, length, request["head_dim"]),
        array(batch, kv_heads, length, request["v_head_dim"]),
    ]
    function = importlib.import_module(PACKAGE).flash_attn_func
    return functools.partial(function, **options), arguments, {}


def _cached_call(request: dict, cached: np.ndarray) -> tuple[Callable, list, dict]:
    array = functools.partial(here.array, request["dtype"])
    batch, new = len(cached), request["sequences"][0][0]
    kv_heads, head_dim = request["num_kv_heads"], request["head_dim"]
    pages_per_seq, num_pages = request["pages_per_seq"], request["num_pages"]
    # Time does not depend on which pages, so some may occur twice.
    shuffled = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    pages = shuffled[np.arange(batch * pages_per_seq) % num_pages]
    options = {"causal": request["causal"]}
    if request["window"] is not None:
        options["window_size"] = _window(request)

    function = importlib.import_module(PACKAGE).flash_attn_with_kvcache

    def call(q, cache, k, v, cached, table):
        return function(
            q, cache, None, k, v, cache_seqlens=cached, block_table=table, **options
        )

    arguments = [
        array(batch, new, request["num_q_heads"], head_dim),
        array(num_pages, request["page_size"], 2 * kv_heads, head_dim),
        array(batch, new, kv_heads, head_dim),
        array(batch, new, kv_heads, head_dim),
        cached,
        pages.reshape(batch, pages_per_seq),
    ]
    return call, arguments, {"donate_argnums": 1}


def main() -> None:
    directory = Path(sys.argv[1])
    request = json.load(sys.stdin)
    device = here.device_of(request["topology"])
    call, arguments, options = call_of(request)
    kernels = here.kernels_of(device, call, *arguments)
    if request["compile"]:
        here.compile_for(device, call, *arguments, **options)
    here.write_call(directory, request, kernels, ["flywheel-tpu"])


if __name__ == "__main__":
    main()

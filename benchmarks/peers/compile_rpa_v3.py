"""Compiles a call of public RPA v3 in an environment that has it; ``calls`` starts it.

    PYTHON compile_rpa_v3.py DIRECTORY < request.json

``blocks`` has ``bq_sz``, ``bkv_sz``, ``bq_csz`` and ``bkv_csz``, for the phases that
have sequences; without it the peer chooses. A phase without sequences does no work and
gets small blocks, so that nobody waits for its compilation.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import here
import jax.numpy as jnp
import numpy as np

KERNEL = "tpu_inference.kernels.ragged_paged_attention.v3.kernel"
BLOCKS = ("bq_sz", "bkv_sz", "bq_csz", "bkv_csz")


def block_options(request: dict) -> dict[str, tuple[int, ...]]:
    """The blocks of both phases, as the peer's keyword arguments.

    Raises:
      ValueError: Not all four blocks, or others.
    """
    given = request["blocks"]
    if given and set(given) != set(BLOCKS):
        raise ValueError(f"blocks: expected {', '.join(BLOCKS)}, got {given}")
    smallest = max(request["page_size"], 128)
    options = {}
    for phase, has_sequences in (
        ("d", request["has_decodes"]),
        ("m", request["has_others"]),
    ):
        if not has_sequences:
            options[f"{phase}_block_sizes"] = (1, smallest, 1, smallest)
        elif given:
            options[f"{phase}_block_sizes"] = tuple(given[name] for name in BLOCKS)
    return options


def scalars(request: dict) -> list[np.ndarray]:
    """kv_lens [S], page_indices [S * P], cu_q_lens [S + 1] and distribution [3]."""
    max_seqs, page_size = request["max_seqs"], request["page_size"]
    q_lens, kv_lens = np.array(request["sequences"], np.int32).T
    count, num_pages = len(q_lens), request["num_pages"]
    table = np.zeros((max_seqs, request["pages_per_seq"]), np.int32)
    used = -(-kv_lens // page_size)
    # Time does not depend on which pages, so some may occur twice.
    shuffled = np.random.default_rng(0).permutation(num_pages)
    first = 0
    for row, pages in enumerate(used):
        table[row, :pages] = shuffled[np.arange(first, first + pages) % num_pages]
        first += pages
    starts = np.full(max_seqs + 1, q_lens.sum(), np.int32)
    starts[: count + 1] = [0, *np.cumsum(q_lens)]
    decodes = int(np.sum(q_lens == 1))
    return [
        np.pad(kv_lens, (0, max_seqs - count)),
        table.ravel(),
        starts,
        np.array([decodes, decodes, count], np.int32),
    ]


def main() -> None:
    directory = Path(sys.argv[1])
    request = json.load(sys.stdin)
    device = here.device_of(request["topology"])
    # Its package imports a server first.
    module = here.import_alone(KERNEL)
    array = functools.partial(here.array, request["dtype"])
    tokens, head_dim = request["max_tokens"], request["head_dim"]
    new = array(tokens, request["num_kv_heads"], head_dim)
    cache = module.get_kv_cache_shape(
        request["num_pages"],
        request["page_size"],
        request["num_kv_heads"],
        head_dim,
        jnp.dtype(request["dtype"]),
    )
    call = functools.partial(
        module.ragged_paged_attention,
        use_causal_mask=request["causal"],
        sliding_window=request["window"],
        sm_scale=head_dim**-0.5,
        **block_options(request),
    )
    arguments = [
        array(tokens, request["num_q_heads"], head_dim),
        new,
        new,
        array(*cache),
        *scalars(request),
    ]
    kernels = here.kernels_of(device, call, *arguments)
    if request["compile"]:
        here.compile_for(device, call, *arguments, donate_argnums=(0, 1, 2, 3))
    here.write_call(directory, request, kernels, ["tpu-inference"])


if __name__ == "__main__":
    main()

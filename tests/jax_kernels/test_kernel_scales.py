"""Scales that are arrays, in the kernel: as accurate as numbers, and the same bytes.

As in test_kernel_numerics.py each case is held to the error budget of its data and to
every byte of the cache. Scales differ by key head, by far more than any rounding.
"""

from typing import Any

import numpy as np
import pytest

from jax_kernels.ragged_paged_attention import BlockSizes
from tests.conftest import HAS_TPU
from tests.jax_kernels.test_kernel_numerics import (
    E4M3,
    E5M2,
    F32,
    INT8,
    Case,
)

# Each case compiles a simulation of its own.
pytestmark = pytest.mark.slow


def by_head(num_heads: int, *scales: float) -> np.ndarray:
    """f32[num_heads], these numbers in turn."""
    return np.resize(np.array(scales, np.float32), num_heads)


def scales(num_heads: int, *names: str, size: float = 1.0) -> dict[str, Any]:
    """Scales of each key head, by the names of options."""
    numbers = {"q_scale": (0.02, 0.01), "k_scale": (0.7, 0.3), "v_scale": (0.2, 3.0)}
    return {
        name: by_head(num_heads, *numbers[name]) * np.float32(size) for name in names
    }


KV = ("k_scale", "v_scale")
QKV = ("q_scale", *KV)
LONG = BlockSizes(512, 32, 32)


def case(heads: tuple[int, int], *names: str, size: float = 1.0, **fields: Any) -> Case:
    options = scales(heads[1], *names, size=size) | fields.pop("options", {})
    return Case(heads=heads, options=options, **fields)


# A scale of every kind and place, each in some case.
CASES = {
    "bf16": case((4, 2), *KV),
    "e4m3_queries_fused_sinks": case(
        (6, 3), *QKV, cache_dtype=E4M3, head_dim=64, with_sinks=True
    ),
}
EXTENDED = {
    "f32": case((2, 2), *KV, q_dtype=F32, cache_dtype=F32),
    "wide": case((3, 1), *KV, head_dim=256, cache_dtype=E4M3),
    "odd_heads": case(
        (5, 5),
        *KV,
        head_dim=40,
        cache_dtype=E4M3,
        page_size=64,
        lengths=((1, 17), (5, 5)),
    ),
    "int8_queries": case(
        (8, 4), *QKV, size=0.1, cache_dtype=INT8, options={"soft_cap": 5.0}
    ),
    "e5m2_queries": case((4, 2), *QKV, cache_dtype=E5M2, head_dim=64),
    "only_keys_are_arrays": case(
        (4, 2), "k_scale", cache_dtype=E4M3, options={"q_scale": 0.01, "v_scale": 0.4}
    ),
    "only_queries_are_arrays": case(
        (4, 2), "q_scale", cache_dtype=E4M3, options={"k_scale": 0.5}
    ),
    "scalars": Case(
        cache_dtype=E4M3,
        options={
            name: np.array(scale, np.float32)
            for name, scale in {"q_scale": 0.02, "k_scale": 0.3, "v_scale": 3.0}.items()
        },
    ),
    "without_update": case(
        (4, 2), *QKV, cache_dtype=E4M3, options={"update_kv_cache": False}
    ),
    "window_alone": case(
        (8, 4),
        *KV,
        cache_dtype=E4M3,
        head_dim=64,
        with_sinks=True,
        blocks=BlockSizes(64, 32, 32),
        lengths=((1, 30), (1, 64), (1, 131), (5, 90)),
        options={"sliding_window": 64, "return_lse": True},
    ),
    "paired_fused": case(
        (8, 1), *QKV, cache_dtype=E4M3, head_dim=64, blocks=LONG, page_size=64,
        lengths=((1, 60), (1, 513), (1, 1300)), options={"return_lse": True},
    ),
    "several_new_tokens": case(
        (6, 3), *QKV, cache_dtype=E4M3, lengths=((3, 3), (1, 17), (4, 40), (20, 33)),
        options={"decode_q_len": 4},
    ),
    "parts_of_tiles": case(
        (4, 2), *QKV, cache_dtype=E4M3, page_size=64,
        blocks=BlockSizes(64, 64, 512), lengths=((70, 70), (25, 600), (64, 64)),
    ),
    "float8_probabilities": case(
        (8, 2), *QKV, cache_dtype=E4M3, page_size=64,
        blocks=BlockSizes(64, 64, 128), lengths=((64, 300), (70, 200), (1, 130)),
        options={"probabilities_dtype": E4M3, "chip": "tpu7x"},
    ),
    "carried": case(
        (4, 2), *KV, cache_dtype=E4M3, page_size=64, options={"chip": "v5e"},
        blocks=BlockSizes(32, 32, 128), lengths=((141, 190), (70, 70), (1, 9)),
    ),
    "shifted": case((4, 2), *QKV, cache_dtype=E4M3, options={"chip": "v6e"}),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [*CASES, *(pytest.param(name, marks=pytest.mark.extended) for name in EXTENDED)],
)
def test_every_head_has_its_own_scales(name):
    if HAS_TPU and "chip" in (CASES | EXTENDED)[name].options:
        pytest.skip("compiles for the TPU there is, not for others")
    (CASES | EXTENDED)[name].check(
        distribution=(3, 3, 4) if name == "several_new_tokens" else None
    )

"""Nothing relies on JAX adding axes: tests of JAX itself make that an error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_kernels import ragged_paged_attention as rpa
from tests.support.ragged_batches import make_ragged_batch

FUNCTIONS = [
    rpa.ragged_paged_attention_reference,
    functools.partial(rpa.ragged_paged_attention, chip="v6e"),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=["reference", "kernel"])
@pytest.mark.parametrize(
    "head_dim, cache_dtype, options",
    [
        (64, "float8_e4m3fn", {"sliding_window": 9, "k_scale": 0.5, "v_scale": 2.0}),
        (128, "bfloat16", {"attend": "new", "return_lse": True, "soft_cap": 20.0}),
        (96, "int8", {"causal": False, "q_scale": 0.1, "decode_q_len": 4}),
        (
            128,
            "int8",
            {
                "q_scale": np.array(0.1, np.float32),
                "k_scale": np.array([0.1, 0.2], np.float32),
                "v_scale": np.array([0.3, 0.4], np.float32),
            },
        ),
    ],
)
def test_attention_is_traced_where_rank_promotion_is_an_error(
    function, head_dim, cache_dtype, options
):
    batch = make_ragged_batch(
        [(1, 17), (5, 5)], head_dim=head_dim, cache_dtype=cache_dtype, with_sinks=True
    )
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(functools.partial(function, **options), *batch.jax_arguments)


def test_parts_are_merged_where_rank_promotion_is_an_error():
    outs, lses = [jnp.ones((5, 4, 32))] * 2, [jnp.ones((5, 4))] * 2
    with jax.numpy_rank_promotion("raise"):
        rpa.merge_attention(outs, lses)

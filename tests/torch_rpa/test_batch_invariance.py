"""With ``batch_invariant`` a token's output is the same bits in any batch.

For CPU tensors and for the JAX reference, which is what an XLA device that is no TPU
computes; tests/jax_kernels/test_kernel_batch_invariance.py has the kernel.
"""

from __future__ import annotations

import functools

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

import torch_rpa
from jax_kernels.ragged_paged_attention import (
    kv_cache_shape,
    ragged_paged_attention_reference,
)
from tests.support import cut_texts
from tests.support.cut_texts import Bucket, Step
from tests.torch_rpa.calls import make_call

LENGTH = 60
PAGE_SIZE = 8
ALONE = [Step(LENGTH)], Bucket(LENGTH, 1, 8)
BUCKET = Bucket(96, 6, 10)
OPTIONS = [
    {},
    {"sliding_window": 11},
    {"soft_cap": 3.0, "return_lse": True},
    {"k_scale": 0.02, "v_scale": 0.03, "q_scale": 0.02},
]


def make_text(options) -> cut_texts.Text:
    dtype = np.dtype("int8" if "k_scale" in options else ml_dtypes.bfloat16)

    def empty_cache(num_pages: int) -> np.ndarray:
        return np.zeros(kv_cache_shape(num_pages, PAGE_SIZE, 2, 32, dtype), dtype)

    return cut_texts.make_text(
        LENGTH,
        empty_cache,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=32,
        page_size=PAGE_SIZE,
        dtype=np.float32,
    )


def run_on_cpu(arguments, **options) -> tuple[np.ndarray, ...]:
    *arrays, sinks = arguments
    tensors = [_to_torch(x) for x in (*arrays, sinks)]
    results = torch_rpa.ragged_paged_attention(*tensors, **options)
    results = results if isinstance(results, tuple) else (results,)
    cache = tensors[3]
    as_bytes = cache.view(torch.uint8).numpy().view(arrays[3].dtype)
    return *(x.numpy() for x in results), as_bytes.reshape(arrays[3].shape)


def _to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def run_reference(arguments, **options) -> tuple[np.ndarray, ...]:
    results = _jitted(tuple(options.items()))(*arguments)
    return tuple(np.asarray(x) for x in results)


@functools.cache
def _jitted(options):
    return jax.jit(functools.partial(ragged_paged_attention_reference, **dict(options)))


RUNS = pytest.mark.parametrize(
    "run", [run_on_cpu, run_reference], ids=["cpu", "jax_reference"]
)


def assert_same_bits(text, run, seeds) -> None:
    expected = cut_texts.serve(text, *ALONE, run)
    for seed in seeds:
        steps = cut_texts.draw_steps(np.random.default_rng(seed), LENGTH, BUCKET)
        actual = cut_texts.serve(text, steps, BUCKET, run, seed=seed)
        for one, other in zip(actual, expected, strict=True):
            assert not cut_texts.differing_tokens(one, other), steps


@RUNS
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_text_gets_the_same_bits_however_it_is_cut(run, options):
    run = functools.partial(run, batch_invariant=True, **options)
    assert_same_bits(make_text(options), run, range(4))


@RUNS
def test_without_it_bits_follow_the_batch(run):
    """Else the tests above would show nothing."""
    with pytest.raises(AssertionError, match="Step"):
        assert_same_bits(make_text({}), run, range(4))


@pytest.mark.parametrize("options", [{}, {"causal_block": 4}, {"causal": False}])
def test_queries_that_attend_alone_see_the_same_keys(options):
    lengths = [(1, 9), (5, 30), (9, 9), (3, 20)]
    outs = [
        torch_rpa.ragged_paged_attention(
            *make_call(lengths), batch_invariant=invariant, **options
        )
        for invariant in (False, True)
    ]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def test_the_readable_reference_names_the_alternative():
    message = "batch_invariant .* impl='reference' .*: leave impl out"
    with pytest.raises(NotImplementedError, match=message):
        torch_rpa.ragged_paged_attention(
            *make_call(), impl="reference", batch_invariant=True
        )

"""Tests of ``jax_kernels.ragged_paged_attention.validation``."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jax_kernels.ragged_paged_attention as rpa
from jax_kernels.contract import Arguments, AttentionOptions
from jax_kernels.ragged_paged_attention import layout, validation
from tests.support.ragged_batches import make_ragged_batch

pytestmark = pytest.mark.versions


def shaped(shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def test_problem_holds_the_static_sizes_with_dtypes_of_jax():
    arguments = Arguments(
        q=shaped((24, 6, 128)),
        k=shaped((24, 2, 128)),
        v=shaped((24, 2, 128)),
        kv_cache=shaped(
            layout.kv_cache_shape(10, 16, 2, 128, jnp.float8_e4m3fn), "float8_e4m3fn"
        ),
        kv_lens=shaped((3,), "int32"),
        page_indices=shaped((12,), "int32"),
        cu_q_lens=shaped((4,), "int32"),
        distribution=shaped((3,), "int32"),
        sinks=shaped((6,), "float32"),
    )
    problem = validation.validate_static(
        arguments, AttentionOptions(out_dtype="float32")
    )
    assert problem == validation.Problem(
        num_tokens=24,
        num_sequences=3,
        pages_per_sequence=4,
        num_q_heads=6,
        q_dtype=jnp.dtype("bfloat16"),
        out_dtype=jnp.dtype("float32"),
        cache=layout.CacheLayout(10, 16, 2, 128, "float8_e4m3fn"),
    )
    assert problem.cache.dtype == jnp.float8_e4m3fn
    assert problem.num_kv_heads == 2
    assert problem.num_q_heads_per_kv_head == 3
    assert problem.head_dim == 128
    assert problem.max_kv_len == 64


FUNCTIONS = [rpa.ragged_paged_attention, rpa.ragged_paged_attention_reference]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_both_functions_apply_the_contract(function):
    arguments = make_ragged_batch([(1, 9)]).jax_arguments
    q, k, v, kv_cache, *metadata = arguments
    with pytest.raises(ValueError, match="v must be given because k is"):
        function(q, k, None, kv_cache, *metadata, update_kv_cache=False)
    with pytest.raises(ValueError, match="update_kv_cache must be True or False"):
        function(*arguments, update_kv_cache=None)
    with pytest.raises(NotImplementedError, match=r"out_dtype float16 .*use bfloat16"):
        function(*arguments, out_dtype=jnp.float16)
    with pytest.raises(NotImplementedError, match=r"q of float16 .*: cast"):
        function(q.astype(jnp.float16), k, v, kv_cache, *metadata)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_values_are_checked_on_request(function):
    arguments = list(make_ragged_batch([(1, 9), (3, 12)]).jax_arguments)
    arguments[7] = jnp.array([2, 2, 2], jnp.int32)
    with pytest.raises(ValueError, match="distribution puts sequence 1 among the dec"):
        function(*arguments, validate=True)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_values_cannot_be_checked_under_a_trace(function):
    arguments = make_ragged_batch([(1, 9)]).jax_arguments
    traced = jax.jit(functools.partial(function, validate=True))
    with pytest.raises(ValueError, match=r"validate must be False where .* traced"):
        traced(*arguments)

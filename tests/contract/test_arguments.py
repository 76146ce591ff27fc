"""Rules of shapes and dtypes, on plain tuples and names."""

import math

import pytest

from jax_kernels.contract import (
    Arguments,
    ArraySpec,
    AttentionOptions,
    CacheGeometry,
    check_arguments,
)
from jax_kernels.contract.arguments import check_scale_values

pytestmark = pytest.mark.versions


def spec(*shape, dtype="bfloat16"):
    return ArraySpec(shape, dtype)


def i32(*shape):
    return ArraySpec(shape, "int32")


def make_arguments(cache_dtype="bfloat16", **changes):
    """T=24, S=3, P=4, Hq=6, Hkv=2, D=128, page_size 16, N=10."""
    cache = CacheGeometry(10, 16, 2, 128, cache_dtype)
    arguments = Arguments(
        q=spec(24, 6, 128),
        k=spec(24, 2, 128),
        v=spec(24, 2, 128),
        kv_cache=ArraySpec(cache.shape, cache_dtype),
        kv_lens=i32(3),
        page_indices=i32(12),
        cu_q_lens=i32(4),
        distribution=i32(3),
    )
    return arguments._replace(**changes)


def check(arguments, **options):
    return check_arguments(arguments, AttentionOptions(**options))


def test_sizes_come_from_the_shapes():
    arguments = make_arguments("float8_e4m3fn", sinks=spec(6, dtype="float32"))
    sizes = check(arguments, out_dtype="float32", q_scale=0.5)
    assert (sizes.num_tokens, sizes.num_sequences, sizes.pages_per_sequence) == (
        24,
        3,
        4,
    )
    assert (sizes.num_q_heads, sizes.q_dtype, sizes.out_dtype) == (
        6,
        "bfloat16",
        "float32",
    )
    assert sizes.cache == CacheGeometry(10, 16, 2, 128, "float8_e4m3fn")
    assert check(make_arguments()).out_dtype == "bfloat16"


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e5m2"])
def test_float8_probabilities_need_a_cache_of_their_dtype(cache_dtype):
    options = {"probabilities_dtype": "float8_e4m3fn"}
    assert check(make_arguments("float8_e4m3fn"), **options)
    message = f"probabilities_dtype .* a {cache_dtype} cache: pass None, or use"
    with pytest.raises(NotImplementedError, match=message):
        check(make_arguments(cache_dtype), **options)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_heads_come_from_the_cache_when_there_are_no_keys(head_dim):
    shape = CacheGeometry(10, 16, 2, head_dim, "int8").shape
    arguments = make_arguments(
        q=spec(24, 6, head_dim), k=None, v=None, kv_cache=ArraySpec(shape, "int8")
    )
    assert check(arguments, update_kv_cache=False).cache.num_kv_heads == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": spec(24, 128)}, r"q must have shape \[T, Hq, D\], got \[24, 128\]"),
        ({"q": spec(0, 6, 128)}, "q must have shape"),
        ({"q": spec(24, 5, 128)}, "q must have a multiple of the 2 key heads.*got 5"),
        ({"k": spec(24, 128)}, r"k must have shape .*\[24, Hkv, 128\], got"),
        ({"k": spec(24, 0, 128)}, "k must have shape"),
        ({"k": spec(23, 2, 128)}, r"k must have shape .* got \[23, 2, 128\]"),
        ({"k": spec(24, 2, 64)}, r"k must have shape .* got \[24, 2, 64\]"),
        ({"k": spec(24, 2, 128, dtype="float32")}, "k must be bfloat16 .*got float32"),
        ({"v": spec(24, 3, 128)}, r"v must be bfloat16 \[24, 2, 128\], got"),
        ({"v": spec(24, 2, 128, dtype="float32")}, "v must be bfloat16"),
        ({"k": None}, "k must be given because v is, got None"),
        ({"v": None}, "v must be given because k is, got None"),
        ({"k": None, "v": None}, "k and v must be given.*update_kv_cache=False"),
        ({"kv_cache": spec(10, 16, 2, 128)}, "kv_cache of .* no bfloat16 cache"),
        (
            {"k": spec(24, 3, 128), "v": spec(24, 3, 128)},
            "kv_cache of bfloat16 must be made for 3 key heads .* or 2 key heads of 65",
        ),
        (
            {"q": spec(24, 6, 256), "k": spec(24, 2, 256), "v": spec(24, 2, 256)},
            "kv_cache .* made for 2 key heads of head_dim 256, .* made for 4 key heads",
        ),
        ({"kv_lens": i32(3, 1)}, r"kv_lens must have shape \[S\], got"),
        ({"kv_lens": i32(0)}, r"kv_lens must have shape \[S\]"),
        (
            {"kv_lens": spec(3, dtype="int16")},
            r"kv_lens must be int32 \[3\], got",
        ),
        ({"cu_q_lens": i32(3)}, r"cu_q_lens must be int32 \[4\], got int32 \[3\]"),
        ({"cu_q_lens": spec(4, dtype="float32")}, "cu_q_lens must be int32"),
        ({"distribution": i32(2)}, r"distribution must be int32 \[3\]"),
        ({"page_indices": i32(3, 4)}, r"page_indices must have shape .* S = 3, got"),
        ({"page_indices": i32(13)}, "page_indices must have shape"),
        ({"page_indices": i32(0)}, "page_indices must have shape"),
        ({"page_indices": spec(12, dtype="uint32")}, "page_indices must be int32"),
        ({"sinks": spec(5, dtype="float32")}, r"sinks must be float32 \[6\], got"),
        ({"sinks": spec(6)}, "sinks must be float32"),
        ({"k_scales": spec(2)}, r"k_scale must be a number, or float32 \[\] or \[Hkv"),
        ({"v_scales": spec(6, dtype="float32")}, r"v_scale .* \[2\], got .* \[6\]"),
        ({"q_scales": spec(1, 2, dtype="float32")}, r"q_scale must .* \[1, 2\]"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        check(make_arguments(**change))


@pytest.mark.parametrize("name", ["q_scale", "k_scale", "v_scale"])
def test_a_scale_is_a_number_or_an_array(name):
    arguments = make_arguments("int8", **{f"{name}s": spec(2, dtype="float32")})
    assert arguments.array_options == (name,)
    assert check(arguments) == check(make_arguments("int8"))
    with pytest.raises(ValueError, match=f"{name} must be given once, got 0.5 and"):
        check(arguments, **{name: 0.5})


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-40, math.inf, math.nan])
def test_numbers_in_a_scale_are_positive_and_finite(value):
    check_scale_values("k_scale", [2.0**-120, 2.0**120])
    with pytest.raises(ValueError, match=r"k_scale must hold positive .* at 1$"):
        check_scale_values("k_scale", [1.0, value])


@pytest.mark.parametrize("missing", ["k", "v"])
def test_one_of_keys_and_values_is_refused_without_an_update_too(missing):
    arguments = make_arguments()._replace(**{missing: None})
    with pytest.raises(ValueError, match=f"{missing} must be given because"):
        check(arguments, update_kv_cache=False)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"q": spec(24, 6, 600)}, {}, "head_dim 600 .*; use"),
        ({"q": spec(24, 6, 24)}, {}, "head_dim 24 .*: pad"),
        ({"q": spec(24, 6, 128, dtype="float16")}, {}, "q of float16 .*: cast"),
        ({}, {"q_scale": 0.5}, "q_scale .* bfloat16 cache: pass q_scale=None, or use"),
        ({"q_scales": spec(dtype="float32")}, {}, "q_scale is not supported with a bf"),
        (
            {"kv_cache": spec(4, 4, 8, 2, 128, dtype="float16")},
            {},
            "kv_cache of float16",
        ),
    ],
)
def test_unsupported_arguments_name_the_alternative(change, options, message):
    with pytest.raises(NotImplementedError, match=message):
        check(make_arguments(**change), **options)

"""Shapes and dtypes of the arrays of a call, and how they fit together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from jax_kernels.contract import cache
from jax_kernels.contract.cache import CacheGeometry
from jax_kernels.contract.options import (
    FACTOR_RANGE,
    INPUT_DTYPES,
    AttentionOptions,
    is_factor,
)

Array = TypeVar("Array")

# An operator of PyTorch has its options and its tensors apart. So an option that may
# also be a tensor is one more tensor there; functions have one parameter for both.
OPTIONS_AS_ARRAYS = {
    "q_scales": "q_scale",
    "k_scales": "k_scale",
    "v_scales": "v_scale",
}
MAY_BE_NONE = ("k", "v", "sinks", *OPTIONS_AS_ARRAYS)


class ArraySpec(NamedTuple):
    """What is known of an array before its values are.

    Sizes may be symbolic, as in a graph of torch.compile.
    """

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Arguments(NamedTuple, Generic[Array]):
    """The arrays of one call, in their order."""

    q: Array  # [T, Hq, D]
    k: Array | None  # [T, Hkv, D]
    v: Array | None  # [T, Hkv, D]
    kv_cache: Array  # see contract.cache
    kv_lens: Array  # i32[S]
    page_indices: Array  # i32[S * P]
    cu_q_lens: Array  # i32[S + 1]
    distribution: Array  # i32[3]
    sinks: Array | None = None  # f32[Hq]
    q_scales: Array | None = None  # f32[] or f32[Hkv], see AttentionOptions.q_scale
    k_scales: Array | None = None  # the same
    v_scales: Array | None = None  # the same

    @property
    def positional(self) -> tuple[Any, ...]:
        """The arrays that functions take by position."""
        return self[: len(self) - len(OPTIONS_AS_ARRAYS)]

    @property
    def array_options(self) -> tuple[str, ...]:
        """Names of the options that are arrays in this call."""
        return tuple(
            option
            for name, option in OPTIONS_AS_ARRAYS.items()
            if getattr(self, name) is not None
        )


@dataclasses.dataclass(frozen=True)
class CallSizes:
    """The static sizes of a call whose arguments fit together.

    Attributes:
      num_tokens: T, query tokens, padding included.
      num_sequences: S, sequences, padding included.
      pages_per_sequence: P.
      num_q_heads: Hq.
      q_dtype: Name of the dtype of queries, keys and values.
      out_dtype: Name of the dtype of the output.
      cache: Geometry of the cache, which holds Hkv, D and the page size.
    """

    num_tokens: int
    num_sequences: int
    pages_per_sequence: int
    num_q_heads: int
    q_dtype: str
    out_dtype: str
    cache: CacheGeometry


def check_given(arrays: Sequence[object]) -> None:
    """Raises unless the arrays that every call needs are there.

    Args:
      arrays: In the order of :class:`Arguments`; trailing ones may be left out.

    Raises:
      ValueError: One of them is None.
    """
    for name, array in zip(Arguments._fields, arrays, strict=False):
        if array is None and name not in MAY_BE_NONE:
            raise ValueError(f"{name} must be given, got None")


def check_arguments(
    arguments: Arguments[ArraySpec], options: AttentionOptions
) -> CallSizes:
    """Checks the arrays of a call, and derives its sizes.

    Raises:
      ValueError: A shape or dtype is wrong, or arrays do not fit each other.
      NotImplementedError: A dtype, a head_dim or a ``q_scale`` that is not supported.
    """
    check_given(arguments)
    q = arguments.q
    num_tokens, num_q_heads, head_dim = _check_queries(q)
    _check_keys_and_values(arguments, options.update_kv_cache)
    geometry = cache.cache_geometry(
        arguments.kv_cache.shape,
        arguments.kv_cache.dtype,
        head_dim,
        num_kv_heads=None if arguments.k is None else arguments.k.shape[1],
    )
    if num_q_heads % geometry.num_kv_heads:
        raise ValueError(
            f"q must have a multiple of the {geometry.num_kv_heads} key heads of "
            f"kv_cache, got {num_q_heads} heads"
        )
    narrow = options.probabilities_dtype
    if narrow is not None and narrow != geometry.dtype_name:
        raise NotImplementedError(
            f"probabilities_dtype {narrow} is not supported with a "
            f"{geometry.dtype_name} cache: pass None, or use a cache of {narrow}"
        )
    _check_scales(arguments, options, geometry.num_kv_heads)
    has_q_scale = options.q_scale is not None or arguments.q_scales is not None
    if has_q_scale and not geometry.is_quantized:
        raise NotImplementedError(
            f"q_scale is not supported with a {geometry.dtype_name} cache: pass "
            f"q_scale=None, or use a cache of {', '.join(cache.QUANTIZED_DTYPES)}"
        )
    num_sequences, pages_per_sequence = _check_metadata(arguments)
    if arguments.sinks is not None:
        _check("sinks", arguments.sinks, "float32", num_q_heads)
    return CallSizes(
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        pages_per_sequence=pages_per_sequence,
        num_q_heads=num_q_heads,
        q_dtype=q.dtype,
        out_dtype=options.out_dtype or q.dtype,
        cache=geometry,
    )


def _check_queries(q: ArraySpec) -> tuple[int, int, int]:
    """Returns T, Hq and D."""
    if len(q.shape) != 3 or 0 in q.shape:
        raise ValueError(f"q must have shape [T, Hq, D], got {list(q.shape)}")
    if q.dtype not in INPUT_DTYPES:
        raise NotImplementedError(
            f"q of {q.dtype} is not supported: cast q, k and v to bfloat16 or float32"
        )
    num_tokens, num_q_heads, head_dim = q.shape
    cache.check_head_dim(head_dim)
    return num_tokens, num_q_heads, head_dim


def _check_keys_and_values(arguments: Arguments[ArraySpec], is_written: bool) -> None:
    q, k, v = arguments.q, arguments.k, arguments.v
    if k is None and v is None:
        if is_written:
            raise ValueError(
                "k and v must be given, got None: pass update_kv_cache=False to read "
                "all keys and values from kv_cache"
            )
        return
    if k is None or v is None:
        given, missing = ("v", "k") if k is None else ("k", "v")
        raise ValueError(
            f"{missing} must be given because {given} is, got None: pass both, or "
            "neither with update_kv_cache=False"
        )
    num_tokens, _, head_dim = q.shape
    if len(k.shape) != 3 or 0 in k.shape or k.shape[::2] != (num_tokens, head_dim):
        raise ValueError(
            f"k must have shape [T, Hkv, D] = [{num_tokens}, Hkv, {head_dim}], "
            f"got {list(k.shape)}"
        )
    _check("k", k, q.dtype, *k.shape)
    _check("v", v, q.dtype, *k.shape)


def _check_metadata(arguments: Arguments[ArraySpec]) -> tuple[int, int]:
    """Returns S and P."""
    kv_lens, page_indices = arguments.kv_lens, arguments.page_indices
    if len(kv_lens.shape) != 1 or kv_lens.shape[0] < 1:
        raise ValueError(f"kv_lens must have shape [S], got {list(kv_lens.shape)}")
    num_sequences = kv_lens.shape[0]
    _check("kv_lens", kv_lens, "int32", num_sequences)
    _check("cu_q_lens", arguments.cu_q_lens, "int32", num_sequences + 1)
    _check("distribution", arguments.distribution, "int32", 3)
    num_pages = page_indices.shape[0] if len(page_indices.shape) == 1 else 0
    if num_pages < 1 or num_pages % num_sequences:
        raise ValueError(
            f"page_indices must have shape [S * P] with S = {num_sequences}, "
            f"got {list(page_indices.shape)}"
        )
    _check("page_indices", page_indices, "int32", num_pages)
    return num_sequences, num_pages // num_sequences


def _check_scales(
    arguments: Arguments[ArraySpec], options: AttentionOptions, num_kv_heads: int
) -> None:
    for name in ("q_scales", "k_scales", "v_scales"):
        scales: ArraySpec | None = getattr(arguments, name)
        if scales is None:
            continue
        option = OPTIONS_AS_ARRAYS[name]
        number = getattr(options, option)
        if number is not None:
            raise ValueError(
                f"{option} must be given once, got {number!r} and {name} of {scales}"
            )
        # A size of a graph of torch.compile may be a symbol, which has no hash.
        is_fitting = tuple(scales.shape) in [(), (num_kv_heads,)]
        if not is_fitting or scales.dtype != "float32":
            raise ValueError(
                f"{option} must be a number, or float32 [] or [Hkv] = "
                f"[{num_kv_heads}], got {scales}"
            )


def check_scale_values(option: str, values: Iterable[float]) -> None:
    """Checks the numbers of a scale that is an array.

    Raises:
      ValueError: One of them breaks the rule of the option that is a number.
    """
    for place, value in enumerate(values):
        if not is_factor(value):
            raise ValueError(
                f"{option} must hold positive numbers {FACTOR_RANGE}, got {value!r} at "
                f"{place}"
            )


def _check(name: str, array: ArraySpec, dtype: str, *shape: int) -> None:
    expected = ArraySpec(shape, dtype)
    if array != expected:
        raise ValueError(f"{name} must be {expected}, got {array}")

"""The contract of ``jax_kernels.contract``, for arrays of JAX.

``validate_static`` looks at shapes, dtypes and options, so it works under a trace.
``validate_values`` looks at lengths and page ids, so it needs real numbers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_kernels import contract
from jax_kernels.contract import Arguments, ArraySpec, AttentionOptions, Metadata
from jax_kernels.contract.arguments import OPTIONS_AS_ARRAYS, check_scale_values
from jax_kernels.ragged_paged_attention import layout


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static sizes of one call.

    Attributes:
      num_tokens: T, query tokens, padding included.
      num_sequences: S, sequences, padding included.
      pages_per_sequence: P.
      num_q_heads: Hq.
      q_dtype: Dtype of queries, keys and values.
      out_dtype: Dtype of the output.
      cache: Geometry of the cache, which holds Hkv, D and the page size.
    """

    num_tokens: int
    num_sequences: int
    pages_per_sequence: int
    num_q_heads: int
    q_dtype: np.dtype
    out_dtype: np.dtype
    cache: layout.CacheLayout

    @classmethod
    def of(cls, sizes: contract.CallSizes) -> "Problem":
        """The same sizes, with dtypes of JAX."""
        dtypes = {
            "q_dtype": jnp.dtype(sizes.q_dtype),
            "out_dtype": jnp.dtype(sizes.out_dtype),
            "cache": layout.CacheLayout.of(sizes.cache),
        }
        return cls(**(vars(sizes) | dtypes))

    @property
    def max_kv_len(self) -> int:
        """Tokens that the pages of one sequence hold."""
        return self.pages_per_sequence * self.cache.page_size

    @property
    def num_kv_heads(self) -> int:
        """Hkv."""
        return self.cache.num_kv_heads

    @property
    def num_q_heads_per_kv_head(self) -> int:
        """G = Hq // Hkv."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def head_dim(self) -> int:
        """D."""
        return self.cache.head_dim


def dtype_name(option: str, dtype: DTypeLike | None) -> str | None:
    """The name by which the contract knows the dtype that an option is."""
    try:
        return None if dtype is None else jnp.dtype(dtype).name
    except TypeError as error:
        raise ValueError(f"{option} must be a dtype or None, got {dtype!r}") from error


def named_options(values: Mapping[str, Any]) -> AttentionOptions:
    """The options among named values, with dtypes of JAX: ``locals()`` of a call.

    Raises:
      ValueError: A value breaks its rule.
      NotImplementedError: A dtype that is not supported.
    """
    names = {
        name: dtype_name(name, values[name])
        for name in ("probabilities_dtype", "out_dtype")
    }
    return AttentionOptions.named_in({**values, **names})


def arguments_and_options(
    values: Mapping[str, Any],
) -> tuple[Arguments[Any], AttentionOptions]:
    """The arrays and the options among named values: ``locals()`` of a call.

    An option that is an array is one of the arrays, and None among the options.

    Raises:
      ValueError: A value breaks its rule.
      NotImplementedError: A dtype that is not supported.
    """
    arrays = {
        name: values[option]
        for name, option in OPTIONS_AS_ARRAYS.items()
        if isinstance(values[option], jax.Array | np.ndarray)
    }
    given = [values[name] for name in Arguments._fields if name in values]
    arguments = Arguments(*given, **arrays)
    numbers = dict.fromkeys(arguments.array_options)
    return arguments, named_options({**values, **numbers})


def validate_static(arguments: Arguments[Any], options: AttentionOptions) -> Problem:
    """Checks everything that is known while tracing, and derives the static sizes.

    Args:
      arguments: Arrays, tracers or ``jax.ShapeDtypeStruct``.
      options: Already checked, each for itself.

    Raises:
      ValueError: An argument is wrong; the message has its name, what it must be and
        what it is.
      NotImplementedError: An argument is meaningful but not supported; the message
        names the alternative.
    """
    return Problem.of(_sizes(arguments, options))


def validate_values(arguments: Arguments[Any], options: AttentionOptions) -> None:
    """Checks the numbers of the metadata; see ``contract.check_metadata``.

    Raises:
      ValueError: A number is wrong, or there are none because of a trace.
    """
    arrays = [getattr(arguments, name) for name in Metadata._fields]
    scales = {
        option: getattr(arguments, name)
        for name, option in OPTIONS_AS_ARRAYS.items()
        if option in arguments.array_options
    }
    if any(isinstance(array, jax.core.Tracer) for array in (*arrays, *scales.values())):
        raise ValueError(
            "validate must be False where the function is traced, as under jax.jit, "
            "because arrays have no values there, got True"
        )
    for option, array in scales.items():
        check_scale_values(option, np.asarray(array).reshape(-1).tolist())
    metadata = Metadata(*(np.asarray(array) for array in arrays))
    contract.check_metadata(metadata, _sizes(arguments, options), options)


def _sizes(arguments: Arguments[Any], options: AttentionOptions) -> contract.CallSizes:
    specs: list[Any] = [
        None if a is None else ArraySpec(tuple(a.shape), jnp.dtype(a.dtype).name)
        for a in arguments
    ]
    return contract.check_arguments(Arguments(*specs), options)

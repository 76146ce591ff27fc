"""What a bridge needs of JAX: which function to trace, for what, and how to lower it.

JAX is used as a compiler front end. It traces a function and lowers it for a named
platform; it never opens the TPU, which belongs to the framework that calls the bridge.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from jax_kernels import tuned
from jax_kernels.contract.arguments import OPTIONS_AS_ARRAYS
from torch_rpa.options import AttentionOptions
from torch_rpa.validation import Inputs


class Target(NamedTuple):
    """What a computation is lowered for.

    Attributes:
        platform: "tpu" or "cpu", as JAX names them.
        chip: "v5e", "v6e", "tpu7x", ...; None if unknown or not a TPU.
        implementation: "pallas" or "reference".
    """

    platform: str
    chip: str | None
    implementation: str


def jax_function(
    options: AttentionOptions,
    target: Target,
    block_sizes: Sequence[int] | None = None,
) -> Callable[..., tuple[Any, ...]]:
    """Returns the JAX function of one call.

    Args:
        options: All that is no tensor.
        target: Says which implementation.
        block_sizes: Tiles of the kernel, if they are given; the plain computation has
            none.

    Returns:
        A function of the arrays of :class:`torch_rpa.validation.Inputs`, in their
        order, None where a tensor is None. It returns what
        :meth:`torch_rpa.bridges.Bridge.call` does.
    """
    return functools.partial(
        _results, _implementation(target, block_sizes), vars(options)
    )


def with_array_options(
    function: Callable[..., Any], keywords: dict[str, Any]
) -> Callable[..., Any]:
    """Returns a documented JAX function as one of all arrays by position.

    Args:
        function: Takes options that are arrays as keywords.
        keywords: The other ones.

    Returns:
        A function of the arrays of :class:`torch_rpa.validation.Inputs`, in their
        order.
    """

    def call(*arrays: Any) -> Any:
        inputs = Inputs(*arrays)
        options = {
            option: getattr(inputs, name)
            for name, option in OPTIONS_AS_ARRAYS.items()
            if option in inputs.array_options
        }
        return function(*inputs.positional, **(keywords | options))

    return call


def _results(
    implementation: Callable, keywords: dict[str, Any], *arrays: Any
) -> tuple[Any, ...]:
    call = with_array_options(implementation, keywords)
    *attention, new_cache = call(*arrays)
    return (*attention, new_cache) if keywords["update_kv_cache"] else (*attention,)


def num_results(options: AttentionOptions) -> int:
    """Returns how many arrays such a function returns."""
    return 1 + options.return_lse + options.update_kv_cache


def _implementation(target: Target, block_sizes: Sequence[int] | None) -> Callable:
    if target.implementation == "reference":
        from jax_kernels.ragged_paged_attention import ragged_paged_attention_reference

        return ragged_paged_attention_reference
    from jax_kernels.ragged_paged_attention import BlockSizes, ragged_paged_attention

    return functools.partial(
        ragged_paged_attention,
        chip=target.chip,
        block_sizes=None if block_sizes is None else BlockSizes(*block_sizes),
    )


def call_signature(
    tensors: Sequence[torch.Tensor | None], options: dict[str, Any]
) -> tuple[Any, ...]:
    """Returns what the program of a call follows from, but for its target.

    Equal for calls that one program serves, in the key of whatever keeps programs.

    Args:
        tensors: As a bridge takes them.
        options: As a bridge takes them.
    """
    if options.get("block_sizes") is not None:
        options = options | {"block_sizes": tuple(options["block_sizes"])}
    return (
        tuned.token(),
        tuple(options.items()),
        *[None if t is None else (t.shape, t.dtype, t.device) for t in tensors],
    )


def jax_dtype(dtype: torch.dtype) -> Any:
    """Returns the NumPy dtype, ml_dtypes included, with the name of a torch dtype."""
    return import_jax().numpy.dtype(str(dtype).removeprefix("torch."))


def shape_structs(tensors: Sequence[torch.Tensor | None]) -> list[Any]:
    """Returns what JAX traces with instead of arrays: shapes and dtypes, or None."""
    jax = import_jax()
    return [
        None if t is None else jax.ShapeDtypeStruct(tuple(t.shape), jax_dtype(t.dtype))
        for t in tensors
    ]


def hlo_module(function: Callable, structs: Sequence[Any], platform: str) -> bytes:
    """Traces a function and lowers it for a platform, which need not be present.

    Args:
        function: A JAX function.
        structs: Its arguments, from :func:`shape_structs`.
        platform: "tpu" or "cpu".

    Returns:
        A serialised ``HloModuleProto``. Arguments that are not used stay parameters.
    """
    jax = import_jax()
    with lowering_config():
        traced = jax.jit(function, keep_unused=True).trace(*structs)
        lowered = traced.lower(lowering_platforms=(platform,))
        return lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()


@functools.cache
def import_jax() -> Any:
    """Imports JAX such that it never creates a client for the TPU."""
    import jax
    from jax._src import xla_bridge

    if not xla_bridge.backends_are_initialized():
        jax.config.update("jax_platforms", "cpu")
    return jax


@contextlib.contextmanager
def lowering_config() -> Iterator[None]:
    """Sets what lowering needs of JAX's configuration, whatever the process has set."""
    from jax._src import config

    from jax_kernels.ragged_paged_attention import jax_versions

    with (
        jax_versions.byte_code_for_libtpu(),
        config.enable_x64(False),
        # torch_xla partitions with GSPMD and does not know Shardy's dialect.
        config.use_shardy_partitioner(False),
        # The same program from everywhere: no call stacks in it.
        config.traceback_in_locations_limit(0),
    ):
        yield

"""Compiles the kernel with libtpu, for chips that are not there."""

import dataclasses
import functools
import math
import os

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from jax_kernels import chips
from jax_kernels.ragged_paged_attention import (
    jax_versions,
    kv_cache_shape,
    ragged_paged_attention,
)
from jax_kernels.ragged_paged_attention.token_layout import HeadRows, TokenRows
from tests.support.optimised_hlo import Operation, OptimisedHlo

# Read when libtpu is loaded, with the first topology.
for _name, _value in chips.COMPILE_ONLY_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

_HLO_DTYPES = {
    "bfloat16": "bf16",
    "float32": "f32",
    "float8_e4m3fn": "f8e4m3fn",
    "float8_e5m2": "f8e5m2",
    "int8": "s8",
}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Static sizes of a call: by default enough of everything for full block sizes."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    q_dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    page_size: int = 128
    num_pages: int = 512
    pages_per_sequence: int = 64
    num_sequences: int = 64
    num_tokens: int = 2048
    with_sinks: bool = False
    array_scales: tuple[str, ...] = ()  # options that are f32[num_kv_heads]

    @property
    def kv_cache(self) -> tuple[int, ...]:
        return kv_cache_shape(
            self.num_pages,
            self.page_size,
            self.num_kv_heads,
            self.head_dim,
            self.cache_dtype,
        )

    @property
    def cache_bytes(self) -> int:
        return math.prod(self.kv_cache) * jnp.dtype(self.cache_dtype).itemsize

    @property
    def cache_hlo_type(self) -> str:
        """Such as "bf16[512,16,64,2,128]"."""
        sizes = ",".join(map(str, self.kv_cache))
        return f"{_HLO_DTYPES[self.cache_dtype]}[{sizes}]"


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """What the TPU compiler made of a call.

    Attributes:
      operations: All but parameters.
      alias_bytes: Memory that outputs take over from arguments.
      temp_bytes: Memory beside arguments and outputs.
      code_bytes: Generated code, with what is in every program.
    """

    operations: tuple[Operation, ...]
    alias_bytes: int
    temp_bytes: int
    code_bytes: int


def compile_kernel(shapes: Shapes, chip: str, **options) -> CompiledKernel:
    """Compiles one call of ``ragged_paged_attention``.

    Arguments and results are row-major, as a model holds them: left to itself XLA
    would choose transposed layouts for them, since nothing else is in the program. New
    keys and values with an odd number of heads are row-major in each head, as XLA lays
    them out by default: otherwise it would pad their heads.

    Args:
      shapes: Of the arguments.
      chip: A key of ``chips.COMPILED``.
      **options: Keyword arguments of ``ragged_paged_attention``. Without
        ``update_kv_cache`` there are no keys and values, and the cache is not
        returned: a program cannot return an argument without a copy.
    """
    updates = options.get("update_kv_cache", True)

    def call(*arguments):
        *arguments, scales = arguments
        *attention, kv_cache = ragged_paged_attention(
            *arguments, sm_scale=shapes.head_dim**-0.5, chip=chip, **options, **scales
        )
        return (*attention, kv_cache) if updates else tuple(attention)

    device = _device(chip)
    row_major = functools.partial(_row_major, device)
    queries = (shapes.num_tokens, shapes.num_q_heads, shapes.head_dim)
    tokens = (shapes.num_tokens, shapes.num_kv_heads, shapes.head_dim)
    by_head = (1, 0, 2) if shapes.num_kv_heads % 2 else None
    new_tokens = row_major(tokens, shapes.q_dtype, by_head)
    table = shapes.num_sequences * shapes.pages_per_sequence
    arguments = [
        row_major(queries, shapes.q_dtype),
        new_tokens if updates else None,
        new_tokens if updates else None,
        row_major(shapes.kv_cache, shapes.cache_dtype),
        row_major((shapes.num_sequences,), "int32"),
        row_major((table,), "int32"),
        row_major((shapes.num_sequences + 1,), "int32"),
        row_major((3,), "int32"),
        row_major((shapes.num_q_heads,), "float32") if shapes.with_sinks else None,
        dict.fromkeys(
            shapes.array_scales, row_major((shapes.num_kv_heads,), "float32")
        ),
    ]
    num_axes = [3, 2] if options.get("return_lse") else [3]
    results = [_format(device, number) for number in (num_axes + [5] * updates)]
    jitted = jax.jit(
        call,
        donate_argnums=(3,) if updates else (),
        out_shardings=tuple(results),
    )
    with jax_versions.byte_code_for_libtpu():
        compiled = jitted.lower(*arguments).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    return CompiledKernel(
        operations=tuple(OptimisedHlo(text).operations()),
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
    )


def view_operations(
    layout: TokenRows | HeadRows,
    shape: tuple[int, int, int],
    order: tuple[int, int, int],
    chip: str,
) -> list[str]:
    """Operations of a program that copies the view of an array by a kernel.

    Args:
      layout: Gives the view.
      shape: [T, H, lanes]
      order: Of the axes of the array in memory, the outermost first.
      chip: A key of ``chips.COMPILED``.
    """

    def copy(source, target, semaphore):
        copied = pltpu.make_async_copy(source, target, semaphore)
        copied.start()
        copied.wait()

    def call(x):
        view = layout.view(x)
        out = pl.pallas_call(
            copy,
            out_shape=jax.ShapeDtypeStruct(view.shape, view.dtype),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[pltpu.SemaphoreType.DMA(())],
        )(view)
        return layout.heads(out) if isinstance(layout, TokenRows) else out

    device = _device(chip)
    argument = _row_major(device, shape, layout.dtype.name, order)
    num_axes = 3 if isinstance(layout, TokenRows) else 6
    jitted = jax.jit(call, out_shardings=_format(device, num_axes))
    with jax_versions.byte_code_for_libtpu():
        text = jitted.lower(argument).compile().as_text()
    assert text is not None
    return [operation.name for operation in OptimisedHlo(text).operations()]


@functools.cache
def _device(chip: str):
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=chips.COMPILED[chip].topology
    )
    return topology.devices[0]


def _format(device, num_axes: int, order: tuple[int, ...] | None = None) -> Format:
    """A layout by the order of its axes, the outermost first; row-major by default."""
    layout = Layout(order or tuple(range(num_axes)))
    return Format(layout, SingleDeviceSharding(device))


def _row_major(
    device, shape: tuple[int, ...], dtype: str, order: tuple[int, ...] | None = None
) -> jax.ShapeDtypeStruct:
    """An argument; with ``order``, as in ``_format``, row-major in that order."""
    return jax.ShapeDtypeStruct(
        shape, jnp.dtype(dtype), sharding=_format(device, len(shape), order)
    )

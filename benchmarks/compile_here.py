"""Compiles the kernel in this process; ``benchmarks.compiler`` starts it.

    python -m benchmarks.compile_here CHIP < request.json

The request has the static shape and the block sizes. The flags of the compiler are in
the environment, and with them where it writes its files. The optimised HLO of the
program goes to standard output.
"""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from benchmarks import cases, compiler
from jax_kernels import chips
from jax_kernels.ragged_paged_attention import (
    BlockSizes,
    kv_cache_shape,
    ragged_paged_attention,
)


def _compile(
    shape: cases.StaticShape, chip: str, blocks: tuple[int, int, int] | None
) -> str:
    """Optimised HLO.

    Arguments and results are row-major, as a model holds them: left to itself XLA would
    choose transposed layouts for some, since nothing else is in the program. New keys
    and values with an odd number of heads are row-major in each head, as XLA lays them
    out by default: otherwise it would pad their heads.
    """
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=chips.COMPILED[chip].topology
    )
    where = SingleDeviceSharding(topology.devices[0])

    def row_major(num_axes: int) -> Format:
        return ordered(*range(num_axes))

    def ordered(*axes: int) -> Format:
        """A layout by the order of the axes, the outermost first."""
        return Format(Layout(axes), where)

    def array(
        dtype: str, *sizes: int, placed: Format | None = None
    ) -> jax.ShapeDtypeStruct:
        placed = placed or row_major(len(sizes))
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=placed)

    model = shape.model
    queries = (shape.num_tokens, model.num_q_heads, model.head_dim)
    tokens = (shape.num_tokens, model.num_kv_heads, model.head_dim)
    cache = kv_cache_shape(
        min(shape.num_pages, compiler.MAX_PAGES),
        shape.page_size,
        model.num_kv_heads,
        model.head_dim,
        jnp.dtype(shape.cache_dtype),
    )

    by_head = ordered(1, 0, 2) if model.num_kv_heads % 2 else None
    new_tokens = array(shape.q_dtype, *tokens, placed=by_head)

    updates = shape.update_kv_cache

    def call(*arguments):
        *attention, new_cache = ragged_paged_attention(
            *arguments,
            chip=chip,
            block_sizes=BlockSizes(*blocks) if blocks else None,
            **shape.options,
        )
        return (*attention, new_cache) if updates else tuple(attention)

    num_axes = [len(queries)]
    num_axes += [len(queries) - 1] if shape.return_lse else []
    num_axes += [len(cache)] if updates else []
    jitted = jax.jit(
        call,
        donate_argnums=3 if updates else (),
        out_shardings=tuple(map(row_major, num_axes)),
    )
    lowered = jitted.lower(
        array(shape.q_dtype, *queries),
        new_tokens if updates else None,
        new_tokens if updates else None,
        array(shape.cache_dtype, *cache),
        array("int32", shape.num_sequences),
        array("int32", shape.num_pages),
        array("int32", shape.num_sequences + 1),
        array("int32", 3),
        array("float32", model.num_q_heads) if model.with_sinks else None,
    )
    text = lowered.compile().as_text()
    assert text is not None
    return text


def main() -> None:
    (chip,) = sys.argv[1:]
    request = json.load(sys.stdin)
    fields = request["shape"]
    model = cases.Model(**fields.pop("model"))
    print(_compile(cases.StaticShape(model, **fields), chip, request["blocks"]))


if __name__ == "__main__":
    main()

"""One call of the kernel on each device of a mesh, with what the engine gives."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_kernels import ragged_paged_attention as rpa
from jax_kernels.integrations.tpu_inference import cache_shape

MAX_DECODE_QUERIES = 16

AxisNames = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Axes:
    """Names of axes of the mesh.

    Attributes:
      data: Over which sequences are split, each part with pages of its own.
      heads: Over which heads are split.
      context: Over which a sequence would be split, which is refused.
    """

    data: AxisNames
    heads: AxisNames
    context: tuple[str, ...] = ("dcp", "pcp")


class Step(NamedTuple):
    """The metadata of a step; each array is that of all parts of the data, in a row."""

    kv_lens: jax.Array  # i32[S]
    page_indices: jax.Array  # i32[S * P]
    cu_q_lens: jax.Array  # i32[S + 1]
    distribution: jax.Array  # i32[3]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_cache: jax.Array,
    step: Step,
    sinks: jax.Array | None,
    *,
    mesh: Mesh,
    axes: Axes,
    sm_scale: float,
    causal: bool,
    sliding_window: int | None,
    soft_cap: float | None,
    q_scale: float | None,
    k_scale: float | None,
    v_scale: float | None,
    update_kv_cache: bool,
    decode_query_size: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attends on each device with its heads and its sequences.

    On TPUs the kernel computes, on other devices its reference.

    Args:
      q: [T, Hq, D].
      k: [T, Hkv, D], in the dtype of ``q`` or divided by ``k_scale`` and rounded to
        that of the cache. Fewer heads than devices are repeated.
      v: Like ``k``.
      kv_cache: In a shape of ``cache_shape.engine_shape``, heads of all devices on
        axis 2.
      step: See there.
      sinks: [Hq], or None.
      mesh: The devices.
      axes: Names of its axes.
      sm_scale: Factor of the scores.
      causal: Whether queries see only keys up to their own position.
      sliding_window: Number of positions seen.
      soft_cap: Bound of the scores.
      q_scale: Quantises queries.
      k_scale: Factor of the stored keys.
      v_scale: Factor of the stored values.
      update_kv_cache: Whether ``k`` and ``v`` are written.
      decode_query_size: Most queries of a sequence that counts as decoding.
      interpret: Run the kernel in interpret mode, for tests.

    Returns:
      The output [T, Hq, D] and the cache.

    Raises:
      ValueError: Heads cannot be shared out.
      NotImplementedError: The mesh splits sequences.
    """
    for axis in axes.context:
        if mesh.shape.get(axis, 1) > 1:
            raise NotImplementedError(
                f"torch_rpa does not split a sequence over devices, got {axis}="
                f"{mesh.shape[axis]}: set it to 1, or leave out --attention-backend"
            )
    k, v = _with_heads_for_all(k, v, _axis_size(mesh, axes.heads))
    device = mesh.devices.flat[0]
    attend_here = functools.partial(
        _attend_on_device,
        sm_scale=sm_scale * (1.0 if k_scale is None else k_scale),
        causal=causal,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        q_scale=q_scale,
        v_scale=v_scale,
        update_kv_cache=update_kv_cache,
        decode_query_size=decode_query_size,
        chip=device.device_kind if device.platform == "tpu" else None,
        interpret=interpret,
    )
    tokens = P(axes.data, axes.heads, None)
    cache_spec = P(axes.data, None, axes.heads)
    sequences = P(axes.data)
    mapped = jax.shard_map(
        attend_here,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, cache_spec, sequences, P(axes.heads)),
        out_specs=(tokens, cache_spec),
        check_vma=False,
    )
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    return mapped(q, k, v, kv_cache, step, sinks)


def _attend_on_device(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_cache: jax.Array,
    step: Step,
    sinks: jax.Array | None,
    *,
    v_scale: float | None,
    decode_query_size: int,
    chip: str | None,
    interpret: bool,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    head_dim = q.shape[-1]
    q, k, v = (_padded(x) for x in (q, k, v))
    if options["update_kv_cache"]:
        # Exact: numbers of the cache's dtype, which the kernel rounds to themselves.
        new = k.astype(q.dtype), v.astype(q.dtype)
    else:
        new = None, None
    local = kv_cache.reshape(cache_shape.kernel_shape(kv_cache.shape))
    if decode_query_size > MAX_DECODE_QUERIES:
        # All are served as sequences of any length, which never changes the answer.
        distribution = step.distribution.at[:2].set(0)
        step = step._replace(distribution=distribution)
        decode_query_size = 1
    options["decode_q_len"] = decode_query_size
    arguments: tuple[Any, ...] = (q, *new, local, *step, sinks)
    if chip is None and not interpret:
        out, local = rpa.ragged_paged_attention_reference(*arguments, **options)
    else:
        out, local = rpa.ragged_paged_attention(
            *arguments, chip=chip, interpret=interpret, **options
        )
    if v_scale is not None:
        out = (out * v_scale).astype(out.dtype)
    return out[..., :head_dim], local.reshape(kv_cache.shape)


def _padded(x: jax.Array) -> jax.Array:
    """[..., D] with zeros up to the head_dim that the cache is made for."""
    width = cache_shape.padded_head_dim(x.shape[-1]) - x.shape[-1]
    return jnp.pad(x, [(0, 0), (0, 0), (0, width)]) if width else x


def _with_heads_for_all(
    k: jax.Array, v: jax.Array, num_shards: int
) -> tuple[jax.Array, jax.Array]:
    """Repeats key heads where there are fewer of them than devices."""
    num_kv_heads = k.shape[1]
    if num_kv_heads >= num_shards:
        return k, v
    if num_shards % num_kv_heads:
        raise ValueError(
            f"the number of key heads must divide the {num_shards} devices that heads "
            f"are split over, got {num_kv_heads}: use another tensor_parallel_size"
        )
    factor = num_shards // num_kv_heads
    return jnp.repeat(k, factor, axis=1), jnp.repeat(v, factor, axis=1)


def _axis_size(mesh: Mesh, names: AxisNames) -> int:
    """How many devices are along one axis or several."""
    if names is None:
        return 1
    names = (names,) if isinstance(names, str) else names
    return math.prod(mesh.shape.get(name, 1) for name in names)

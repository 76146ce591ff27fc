"""Tensor parallelism on one host, with PyTorch/XLA SPMD: heads over a mesh axis.

XLA cannot partition a kernel by itself. So the operator runs in a manual region: each
device calls it with its own heads and its own part of the cache, and nothing has to be
exchanged. Query heads of one group stay with their key head::

    mesh axis "model" of 4, 8 query heads, 4 key heads

    device      0       1       2       3
    queries     0 1     2 3     4 5     6 7
    cache       k0 v0   k1 v1   k2 v2   k3 v3

A sharded cache is the caches of the devices side by side along its axis of heads: for
``head_dim > 64`` its rows are ``k0 v0 k1 v1 ...``, where an unsharded cache has all key
heads first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torch_rpa import ops, validation
from torch_rpa.kv_cache import empty_kv_cache
from torch_rpa.options import make_options, split_tensors
from torch_rpa.validation import Inputs

if TYPE_CHECKING:
    from torch_xla.distributed.spmd import Mesh


def empty_sharded_kv_cache(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    mesh: Mesh,
    axis: str = "model",
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Returns a new cache of zeros whose heads are sharded over an axis of the mesh.

    Args:
        num_pages: Pages in the pool; every device holds its heads of each.
        page_size: Tokens in a page.
        num_kv_heads: Key heads of all devices together, a multiple of the axis.
        head_dim: From 32 to 512.
        mesh: A mesh of torch_xla with named axes.
        axis: The axis of the mesh to shard over.
        dtype: What keys and values are stored as.

    Raises:
        ValueError: SPMD mode is off, or the heads cannot be divided.
    """
    import torch_xla
    import torch_xla.distributed.spmd as xs

    _check_heads(mesh, axis, num_kv_heads)
    cache = empty_kv_cache(
        num_pages,
        page_size,
        num_kv_heads,
        head_dim,
        dtype=dtype,
        device=torch_xla.device(),
    )
    xs.mark_sharding(cache, mesh, _heads_of(cache, axis))
    return cache


def sharded_ragged_paged_attention(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    kv_cache: torch.Tensor,
    kv_lens: torch.Tensor,
    page_indices: torch.Tensor,
    cu_q_lens: torch.Tensor,
    distribution: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    mesh: Mesh,
    axis: str = "model",
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """:func:`torch_rpa.ragged_paged_attention` with heads sharded over a mesh axis.

    In lazy mode, on XLA tensors, after ``torch_xla.runtime.use_spmd()``. Over other
    axes of the mesh everything is replicated.

    Args:
        q: ``[T, Hq, D]``, all heads; where it is not sharded by heads yet XLA reshards
            it. The same holds for ``k``, ``v`` and ``sinks``.
        k: ``[T, Hkv, D]``.
        v: ``[T, Hkv, D]``.
        kv_cache: From :func:`empty_sharded_kv_cache`, updated in place on each device.
        kv_lens: This and the rest as for one device, replicated.
        page_indices: See there.
        cu_q_lens: See there.
        distribution: See there.
        sinks: ``[Hq]``.
        mesh: The mesh of the cache.
        axis: Its axis of heads.
        return_lse: As for one device.
        options: Other keyword arguments of
            :func:`torch_rpa.ragged_paged_attention`, but for ``impl`` and ``validate``.
            Scales that are tensors are those of all key heads.

    Returns:
        ``[T, Hq, D]``, sharded by heads, and so are the logarithms ``[T, Hq]``.

    Raises:
        ValueError: See the operator; or SPMD mode is off, the cache is not sharded, or
            the heads cannot be divided.
        NotImplementedError: See the operator; or the tensors are not XLA tensors.
    """
    _require_xla(q)
    import torch_xla
    import torch_xla.distributed.spmd as xs
    from torch_xla.distributed.spmd.xla_sharding import unwrap_sharded_tensor

    kv_cache = unwrap_sharded_tensor(kv_cache)
    metadata = (kv_lens, page_indices, cu_q_lens, distribution)
    scales, options = split_tensors(options)
    sizes = validation.validate_static(
        Inputs(q, k, v, kv_cache, *metadata, sinks, **scales), make_options(options)
    )
    heads = sizes.cache.num_kv_heads
    size = _check_heads(mesh, axis, heads)
    if size > 1 and not torch_xla._XLAC._get_xla_sharding_spec(kv_cache):
        raise ValueError(
            "kv_cache must be sharded over the heads, got one that is not sharded: "
            "make it with torch_rpa.spmd.empty_sharded_kv_cache"
        )
    validation.validate_gradients(
        (q, k, v, kv_cache, *metadata, sinks, *scales.values())
    )

    def on_each_device(tensor: torch.Tensor | None, spec: tuple) -> Any:
        if tensor is None:
            return None
        local = xs.enable_manual_sharding(tensor, spec, mesh=mesh)
        return unwrap_sharded_tensor(local)

    def on_all_devices(local: torch.Tensor, spec: tuple, shape: torch.Size) -> Any:
        joined = xs.disable_manual_sharding(local, spec, shape, mesh=mesh)
        return unwrap_sharded_tensor(joined)

    tensors = (
        *[on_each_device(t, (None, axis, None)) for t in (q, k, v)],
        on_each_device(kv_cache, _heads_of(kv_cache, axis)),
        *[on_each_device(t, (None,)) for t in metadata],
        on_each_device(sinks, (axis,)),
    )
    options |= {
        name: on_each_device(scale.expand(heads), (axis,))
        for name, scale in scales.items()
    }
    operators = ops.WITH_LSE if return_lse else ops.WITHOUT_LSE
    with torch.no_grad():
        if options.get("update_kv_cache", True):
            *attention, new_cache = operators.functional(*tensors, **options)
            spec = _heads_of(kv_cache, axis)
            new_cache = on_all_devices(new_cache, spec, kv_cache.shape)
            ops.update_in_place(kv_cache, new_cache)
        else:
            results: Any = operators.readonly(*tensors, **options)
            attention = [*results] if return_lse else [results]
    out = on_all_devices(attention[0], (None, axis, None), q.shape)
    if not return_lse:
        return out
    return out, on_all_devices(attention[1], (None, axis), q.shape[:2])


def _require_xla(q: torch.Tensor) -> None:
    if q.device.type != "xla":
        raise NotImplementedError(
            "torch_rpa.spmd shards XLA tensors over the devices of one process, got "
            f"tensors on {q.device}: run one process for each device, call "
            "torch_rpa.ragged_paged_attention on the heads of each, and add up what "
            "the output projections give with torch.distributed.all_reduce"
        )


def _heads_of(kv_cache: torch.Tensor, axis: str) -> tuple:
    return (None, axis, *[None] * (kv_cache.dim() - 2))


def _check_heads(mesh: Mesh, axis: str, num_kv_heads: int) -> int:
    """Returns how many devices share the heads; raises if they cannot."""
    size = axis_size(mesh, axis)
    if num_kv_heads % size:
        raise ValueError(
            f"num_kv_heads must be a multiple of the {size} devices along "
            f"{axis!r}, got {num_kv_heads}: use a smaller axis, or repeat the key heads"
        )
    return size


def axis_size(mesh: Mesh, axis: str) -> int:
    """Returns how many devices are along an axis of a mesh.

    Raises:
        ValueError: SPMD mode is off, or the mesh has no such axis.
    """
    import torch_xla.runtime

    if not torch_xla.runtime.is_spmd():
        raise ValueError(
            "SPMD mode must be on before tensors are sharded, got off: call "
            "torch_xla.runtime.use_spmd() first"
        )
    sizes: dict[Any, int] = dict(mesh.shape())
    if axis not in sizes:
        raise ValueError(f"axis must be one of {list(sizes)} of mesh, got {axis!r}")
    return sizes[axis]

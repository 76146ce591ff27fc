"""Context parallelism: the cache of each sequence is striped over devices by token.

Token ``t`` of a sequence is on device ``t % n``, as token ``t // n`` of its *stripe*
there, and a stripe has pages as any sequence has. So a long context takes the memory,
and the bandwidth, of all devices. With n = 4 and 10 tokens, of which the last three are
new::

    device 0    tokens 0 4 | 8      device 2    2 6 |
    device 1           1 5 | 9      device 3    3   | 7

A step is planned once, on the host, by :func:`plan_striped_step`. In each layer every
device has all queries and all new tokens. It

* writes those new tokens that are its own to its stripe,
* attends to the tokens that were in its stripe before,
* attends to all new tokens, which are kept in a small cache of their own meanwhile;
  the result counts once.

The parts are merged, for which devices exchange outputs and logarithms, and no keys or
values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from jax_kernels.contract.arguments import check_given
from jax_kernels.contract.cache import check_page_size
from torch_rpa import ops, validation
from torch_rpa.kv_cache import empty_kv_cache
from torch_rpa.merging import merge_attention, merge_stacked
from torch_rpa.options import dtype_name, make_options, split_tensors
from torch_rpa.spmd import axis_size
from torch_rpa.validation import Inputs

if TYPE_CHECKING:
    from torch_xla.distributed.spmd import Mesh


class StripedStep(NamedTuple):
    """The numbers of a step. The first axis of the upper five is the device.

    For all devices it is as :func:`plan_striped_step` gives it; ``of_device`` gives
    those of one. Tensors are int32.
    """

    old_kv_lens: torch.Tensor  # [n, S] tokens of a stripe before the step, plus q_len
    own_rows: torch.Tensor  # [n, W] rows of k and v of the device's new tokens
    own_kv_lens: torch.Tensor  # [n, S] tokens of a stripe after the step
    own_cu_q_lens: torch.Tensor  # [n, S + 1] of its new tokens
    counts_new: torch.Tensor  # [n] 1 for the device whose part of new tokens counts
    page_indices: torch.Tensor  # [S * P] pages of stripes, the same on all devices
    cu_q_lens: torch.Tensor  # [S + 1]
    distribution: torch.Tensor  # [3] without a range for chunks
    new_kv_lens: torch.Tensor  # [S] new tokens of each sequence
    new_page_indices: torch.Tensor  # [S * P'] their pages in the cache of new tokens
    num_tokens: int  # T
    new_page_size: int  # of the cache of new tokens

    def of_device(self, device: int) -> StripedStep:
        """The numbers of one device, without the axis of devices.

        Raises:
            ValueError: There is no such device, or the step is that of one already.
        """
        num_devices = len(self.counts_new) if self.counts_new.dim() else 0
        if not 0 <= device < num_devices:
            raise ValueError(
                f"device must be one of the {num_devices} that the step has numbers "
                f"for, got {device}"
            )
        return self.map(STRIPED, lambda x: x[device])

    def to(self, device: torch.device | str) -> StripedStep:
        """The same numbers on a device of torch."""
        return self.map(STRIPED + SHARED, lambda x: x.to(device))

    def map(
        self, names: Sequence[str], function: Callable[[torch.Tensor], torch.Tensor]
    ) -> StripedStep:
        """The same step with a function of some of its tensors in their places."""
        return self._replace(**{name: function(getattr(self, name)) for name in names})


# The tensors of ``StripedStep`` that differ from device to device, and the others.
STRIPED, SHARED = StripedStep._fields[:5], StripedStep._fields[5:10]


def stripe_len(num_tokens: Any, device: Any, num_devices: int) -> Any:
    """Returns how many of the first tokens of a sequence a device has.

    Ints, or arrays that broadcast.
    """
    return (num_tokens + (num_devices - 1 - device)) // num_devices


def num_new_pages(num_tokens: int, num_sequences: int, page_size: int) -> int:
    """Returns the pages that a cache of new tokens needs.

    Args:
        num_tokens: T.
        num_sequences: S.
        page_size: Of the cache of new tokens.
    """
    return num_sequences + num_tokens // page_size


def plan_striped_step(
    kv_lens: torch.Tensor,
    page_indices: torch.Tensor,
    cu_q_lens: torch.Tensor,
    distribution: torch.Tensor,
    *,
    num_devices: int,
    num_tokens: int,
    new_page_size: int,
) -> StripedStep:
    """Plans a step of a striped cache; all layers share the plan.

    Args:
        kv_lens: int32 ``[S]`` on the CPU, tokens of each sequence on all devices, the
            new ones included.
        page_indices: int32 ``[S * P]``, pages of the stripes. Each has room for
            ``ceil(kv_len / num_devices)`` tokens. All devices use the same pages.
        cu_q_lens: int32 ``[S + 1]``.
        distribution: int32 ``[3]``, as for the operator.
        num_devices: n.
        num_tokens: T, rows of q.
        new_page_size: Tokens in a page of the cache of new tokens.

    Returns:
        Tensors on the CPU. Their sizes follow from S, P, T, n and the page size alone.

    Raises:
        ValueError: An argument has a wrong shape, dtype, device or value, or lengths do
            not fit each other. That the pages are there, and are enough, is checked by
            the operator where it checks values.
    """
    _check_count("num_devices", num_devices)
    _check_count("num_tokens", num_tokens)
    _check_count("new_page_size", new_page_size)
    check_page_size(new_page_size, "new_page_size")
    _check_batch(kv_lens, page_indices, cu_q_lens, distribution)
    lengths = kv_lens.numpy().astype(np.int64)
    num_sequences = len(lengths)
    decode_end, _, live = distribution.tolist()
    starts = cu_q_lens.numpy()[: live + 1].astype(np.int64)
    q_lens = np.zeros(num_sequences, np.int64)
    q_lens[:live] = np.diff(starts)
    lengths[live:] = 0
    if starts[0] != 0:
        raise ValueError(f"cu_q_lens[0] must be 0, got {starts[0]}")
    if (q_lens < 0).any() or (q_lens > lengths).any() or q_lens.sum() > num_tokens:
        raise ValueError(
            "cu_q_lens must not decrease, nor name more tokens than kv_lens or than "
            f"num_tokens = {num_tokens}, got {starts.tolist()} with kv_lens "
            f"{lengths[:live].tolist()}"
        )
    devices = np.arange(num_devices)[:, None]
    old = stripe_len(lengths - q_lens, devices, num_devices)
    own = stripe_len(lengths, devices, num_devices)

    sequence = np.repeat(np.arange(num_sequences), q_lens)
    row = np.arange(len(sequence))
    if live:
        position = row - starts[sequence] + (lengths - q_lens)[sequence]
    else:
        position = row
    width = min(num_tokens, num_sequences + num_tokens // num_devices)
    own_rows = np.zeros((num_devices, width), np.int64)
    for device in range(num_devices):
        rows = row[position % num_devices == device]
        own_rows[device, : len(rows)] = rows

    pages_per_sequence = -(-num_tokens // new_page_size)
    new_pages = -(-q_lens // new_page_size)
    first_page = np.cumsum(new_pages) - new_pages
    new_table = first_page[:, None] + np.arange(pages_per_sequence)
    most = num_new_pages(num_tokens, num_sequences, new_page_size)
    counts_new = np.arange(num_devices) == 0

    def int32(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.int32))

    return StripedStep(
        old_kv_lens=int32(old + q_lens),
        own_rows=int32(own_rows),
        own_kv_lens=int32(own),
        own_cu_q_lens=int32(np.pad(np.cumsum(own - old, axis=1), [(0, 0), (1, 0)])),
        counts_new=int32(counts_new),
        page_indices=page_indices,
        cu_q_lens=int32(np.pad(np.cumsum(q_lens), [(1, 0)])),
        distribution=int32(np.array([decode_end, decode_end, live])),
        new_kv_lens=int32(q_lens),
        new_page_indices=int32(np.minimum(new_table, most - 1).reshape(-1)),
        num_tokens=num_tokens,
        new_page_size=new_page_size,
    )


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a Python int of at least 1, got {value!r}")


def _check_batch(
    kv_lens: torch.Tensor,
    page_indices: torch.Tensor,
    cu_q_lens: torch.Tensor,
    distribution: torch.Tensor,
) -> None:
    """Checks the tensors of a batch, and the order of its ranges."""
    tensors = {
        "kv_lens": kv_lens,
        "page_indices": page_indices,
        "cu_q_lens": cu_q_lens,
        "distribution": distribution,
    }
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
            kind = getattr(tensor, "device", type(tensor).__name__)
            raise ValueError(f"{name} must be a tensor on the CPU, got {kind}")
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.numel():
            raise ValueError(
                f"{name} must be int32 of one axis, got {dtype_name(tensor.dtype)} "
                f"{list(tensor.shape)}"
            )
    num_sequences = len(kv_lens)
    for name, length in (("cu_q_lens", num_sequences + 1), ("distribution", 3)):
        if len(tensors[name]) != length:
            raise ValueError(
                f"{name} must be int32 [{length}], got int32 [{len(tensors[name])}]"
            )
    if len(page_indices) % num_sequences:
        raise ValueError(
            f"page_indices must have shape [S * P] with S = {num_sequences}, got "
            f"[{len(page_indices)}]"
        )
    decode_end, prefill_end, live = distribution.tolist()
    if not 0 <= decode_end <= prefill_end <= live <= num_sequences:
        raise ValueError(
            f"distribution must satisfy 0 <= i <= j <= k <= {num_sequences}, got "
            f"{[decode_end, prefill_end, live]}"
        )


def attend_to_stripe(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_cache: torch.Tensor,
    new_cache: torch.Tensor,
    step: StripedStep,
    sinks: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What one device computes, where each has a process of its own.

    Gather the results of all devices, and join them by
    :func:`torch_rpa.merge_attention`.

    Args:
        q: ``[T, Hq, D]``, the same on all devices.
        k: ``[T, Hkv, D]``, likewise.
        v: ``[T, Hkv, D]``, likewise.
        kv_cache: The stripes of this device; updated in place.
        new_cache: Room for :func:`num_new_pages` pages of new tokens, in the dtype of
            the cache; overwritten. All layers may share it.
        step: ``plan_striped_step(...).of_device(number of this device)``, on its
            device.
        sinks: ``[Hq]``, likewise.
        options: Of the operator: ``sm_scale``, ``causal``, ``soft_cap``, scales,
            ``decode_q_len``, ``probabilities_dtype``, ``out_dtype``, ``block_sizes``.

    Returns:
        ``[T, Hq, D]`` and float32 ``[T, Hq]``.

    Raises:
        ValueError: See the operator; or the step is for another number of tokens, or
            the cache of new tokens does not fit it.
        NotImplementedError: ``sliding_window``, ``causal_block`` or
            ``batch_invariant`` is given, or an option that has no meaning here.
    """

    def in_place(*tensors: Any, **keywords: Any) -> tuple[Any, Any, Any]:
        return *ops.WITH_LSE.public(*tensors, **keywords), tensors[3]

    _check_options(options)
    if not torch.compiler.is_compiling():  # there the fakes of the operator check
        if step.counts_new.dim():
            raise ValueError(
                "step must be that of one device, got that of "
                f"{len(step.counts_new)}: take step.of_device(number)"
            )
        _check_tensors(q, k, v, kv_cache, new_cache, step, sinks, options)
    scales, options = split_tensors(options)
    own = _own_tokens(q, k, v, step.own_rows)
    tensors = q, k, v, kv_cache, new_cache
    old, new, _, _ = _attend(in_place, own, *tensors, step, sinks, options | scales)
    new_lse = torch.where(step.counts_new > 0, new.lse, -torch.inf)
    return merge_attention([old.out, new.out], [old.lse, new_lse])


class _Part(NamedTuple):
    """Attention to some keys."""

    out: torch.Tensor  # [T, Hq, D]
    lse: torch.Tensor  # [T, Hq]


def _own_tokens(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own_rows: torch.Tensor
) -> list[torch.Tensor]:
    """Returns the new tokens that a device keeps, each ``[W, Hkv, D]``.

    Their queries are there for the call alone, so they have the fewest heads.
    """
    rows = own_rows.long()
    return [q[:, : k.shape[1]][rows], k[rows], v[rows]]


def _attend(
    call: Callable[..., tuple[Any, Any, Any]],
    own: Sequence[torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_cache: torch.Tensor,
    new_cache: torch.Tensor,
    step: StripedStep,
    sinks: torch.Tensor | None,
    options: dict[str, Any],
) -> tuple[_Part, _Part, torch.Tensor, torch.Tensor]:
    """Attends on a device to the old tokens of its stripe, and to all new tokens.

    Args:
        call: Takes what ``ops.WITH_LSE.functional`` takes, and returns as much.
        own: See ``_own_tokens``.
        options: Of the operators, scales that are tensors included.

    Returns:
        Both parts, the stripes with their new tokens, and the cache of new tokens.
    """
    batch = step.cu_q_lens, step.distribution
    _, _, kv_cache = call(
        *own,
        kv_cache,
        step.own_kv_lens,
        step.page_indices,
        step.own_cu_q_lens,
        step.distribution,
        **options,
        attend="new",
    )
    old = ops.WITH_LSE.readonly(
        q,
        None,
        None,
        kv_cache,
        step.old_kv_lens,
        step.page_indices,
        *batch,
        **options,
        attend="cache",
        update_kv_cache=False,
    )
    out, lse, new_cache = call(
        q,
        k,
        v,
        new_cache,
        step.new_kv_lens,
        step.new_page_indices,
        *batch,
        sinks,
        **options,
    )
    return _Part(*old), _Part(out, lse), kv_cache, new_cache


def _check_tensors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_cache: torch.Tensor,
    new_cache: torch.Tensor,
    step: StripedStep,
    sinks: torch.Tensor | None,
    options: dict[str, Any],
) -> None:
    """Checks shapes, dtypes and devices before anything is written.

    Raises:
        ValueError: Tensors do not fit each other or the step.
        NotImplementedError: See the operator.
    """
    check_given((q, k, v, kv_cache))
    if step.distribution.device != q.device:
        raise ValueError(
            f"step must be on the device of q, {q.device}, got "
            f"{step.distribution.device}: take step.to(q.device)"
        )
    scales, options = split_tensors(options)
    validation.validate_gradients(
        (q, k, v, kv_cache, new_cache, sinks, *scales.values())
    )
    metadata = step.new_kv_lens, step.page_indices, step.cu_q_lens, step.distribution
    sizes = validation.validate_static(
        Inputs(q, k, v, kv_cache, *metadata, sinks, **scales), make_options(options)
    )
    if sizes.num_tokens != step.num_tokens:
        raise ValueError(
            f"step must be planned for the {sizes.num_tokens} rows of q, got one "
            f"planned for {step.num_tokens}"
        )
    num_pages = num_new_pages(step.num_tokens, sizes.num_sequences, step.new_page_size)
    shape = dataclasses.replace(
        sizes.cache, num_pages=num_pages, page_size=step.new_page_size
    ).shape
    if (
        new_cache.device != q.device
        or new_cache.dtype != kv_cache.dtype
        or new_cache.shape[1:] != shape[1:]
        or len(new_cache) < num_pages
    ):
        raise ValueError(
            f"new_cache must be {sizes.cache.dtype_name} {list(shape)}, or have more "
            f"pages, on {q.device} for this step, got {dtype_name(new_cache.dtype)} "
            f"{list(new_cache.shape)} on {new_cache.device}"
        )


def _check_options(options: dict[str, Any]) -> None:
    if options.get("sliding_window") is not None:
        raise NotImplementedError(
            "sliding_window is not supported with a striped cache, got "
            f"{options['sliding_window']}: a window is short, so keep the caches of "
            "such layers whole on every device"
        )
    if options.get("causal_block") is not None:
        raise NotImplementedError(
            "causal_block is not supported with a striped cache, got "
            f"{options['causal_block']}: new tokens have no positions of the sequence "
            "there, so keep the caches of such models whole on every device"
        )
    if options.get("batch_invariant"):
        raise NotImplementedError(
            "batch_invariant is not supported with a striped cache, where how a "
            "sequence was cut into steps decides which keys are summed apart: keep the "
            "cache whole on every device"
        )
    for name in ("attend", "update_kv_cache", "chunk_prefill_size", "return_lse"):
        if name in options:
            raise NotImplementedError(
                f"{name} has no meaning with a striped cache, got {options[name]!r}: "
                "leave it out"
            )


# ---- one process, with SPMD of PyTorch/XLA


def empty_striped_kv_cache(
    num_pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    mesh: Mesh,
    axis: str = "context",
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Returns a new cache of zeros whose pages are those of the devices of an axis.

    Args:
        num_pages: Pages on each device.
        page_size: Tokens in a page.
        num_kv_heads: Key heads, all on each device.
        head_dim: From 32 to 512.
        mesh: A mesh of torch_xla with named axes.
        axis: The axis of the mesh to stripe over.
        dtype: What keys and values are stored as.
    """
    import torch_xla
    import torch_xla.distributed.spmd as xs

    cache = empty_kv_cache(
        num_pages * axis_size(mesh, axis),
        page_size,
        num_kv_heads,
        head_dim,
        dtype=dtype,
        device=torch_xla.device(),
    )
    xs.mark_sharding(cache, mesh, _striped(cache, axis))
    return cache


def context_parallel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_cache: torch.Tensor,
    new_cache: torch.Tensor,
    step: StripedStep,
    sinks: torch.Tensor | None = None,
    *,
    mesh: Mesh,
    axis: str = "context",
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Attention over a striped cache, for one process that has all devices.

    In lazy mode, on XLA tensors, after ``torch_xla.runtime.use_spmd()``.

    Args:
        q: ``[T, Hq, D]``, replicated, and so are k and v.
        k: ``[T, Hkv, D]``.
        v: ``[T, Hkv, D]``.
        kv_cache: From :func:`empty_striped_kv_cache`; updated in place.
        new_cache: See :func:`attend_to_stripe`; replicated.
        step: From :func:`plan_striped_step`, on the XLA device.
        sinks: ``[Hq]``.
        mesh: The mesh of the cache.
        axis: Its axis of stripes.
        return_lse: Return the logarithms as well.
        options: See :func:`attend_to_stripe`.

    Returns:
        ``[T, Hq, D]``, replicated, and float32 ``[T, Hq]`` if asked for.

    Raises:
        ValueError: SPMD mode is off, or the plan is for another number of devices.
        NotImplementedError: See :func:`attend_to_stripe`.
    """
    import torch_xla.distributed.spmd as xs
    from torch_xla.distributed.spmd.xla_sharding import unwrap_sharded_tensor

    _check_options(options)
    num_devices = axis_size(mesh, axis)
    if len(step.counts_new) != num_devices:
        raise ValueError(
            f"step must be planned for the {num_devices} devices along {axis!r}, got "
            f"one for {len(step.counts_new)}"
        )

    def on_each_device(tensor: torch.Tensor, spec: tuple) -> torch.Tensor:
        local = xs.enable_manual_sharding(tensor, spec, mesh=mesh)
        return unwrap_sharded_tensor(local)

    def replicated(tensor: torch.Tensor) -> torch.Tensor:
        return on_each_device(tensor, (None,) * tensor.dim())

    def striped(tensor: torch.Tensor) -> torch.Tensor:
        return on_each_device(tensor, _striped(tensor, axis))

    def joined(local: torch.Tensor, spec: tuple, shape: Sequence[int]) -> torch.Tensor:
        size = torch.Size(shape)
        whole = xs.disable_manual_sharding(local, spec, size, mesh=mesh)
        return unwrap_sharded_tensor(whole)

    def stacked(local: torch.Tensor) -> torch.Tensor:
        """[n, ...], the arrays of the devices."""
        local = local.unsqueeze(0)
        return joined(local, _striped(local, axis), (num_devices, *local.shape[1:]))

    kv_cache, new_cache = map(unwrap_sharded_tensor, (kv_cache, new_cache))
    _check_tensors(q, k, v, kv_cache, new_cache, step, sinks, options)
    # Only what has to be is in the manual region. With tokens chosen and parts merged
    # there too, libtpu 0.0.52 ended the process.
    xs.mark_sharding(step.own_rows, mesh, (axis, None))
    own = [striped(x).squeeze(0) for x in _own_tokens(q, k, v, step.own_rows)]
    local_step = step.map(STRIPED, lambda x: striped(x).squeeze(0))
    local_step = local_step.map(SHARED, replicated)
    scales, options = split_tensors(options)
    options |= {
        name: replicated(scale.expand(k.shape[1])) for name, scale in scales.items()
    }
    with torch.no_grad():
        old, new, striped_cache, all_new = _attend(
            ops.WITH_LSE.functional,
            own,
            replicated(q),
            replicated(k),
            replicated(v),
            striped(kv_cache),
            replicated(new_cache),
            local_step,
            None if sinks is None else replicated(sinks),
            options,
        )
        for cache, value, spec in (
            (kv_cache, striped_cache, _striped(kv_cache, axis)),
            (new_cache, all_new, (None,) * new_cache.dim()),
        ):
            ops.update_in_place(cache, joined(value, spec, cache.shape))
        old_parts = _Part(*map(stacked, old))
        new_part = _Part(*(joined(x, (None,) * x.dim(), x.shape) for x in new))
        merged = _Part(*merge_stacked(*old_parts))
        out, lse = merge_attention(*zip(merged, new_part, strict=True))
    return (out, lse) if return_lse else out


def _striped(tensor: torch.Tensor, axis: str) -> tuple:
    return (axis, *(None,) * (tensor.dim() - 1))

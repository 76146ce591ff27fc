"""Times a case on the device there is, through the torch operator or through JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks import cases, timing
from benchmarks.tpu_timing import workloads

NO_TPU = 2
NO_TPU_MESSAGE = (
    "There is no TPU here, so nothing can be measured.\n"
    "python -m benchmarks.predict needs none."
)


@dataclasses.dataclass(frozen=True)
class Repetition:
    """How often a case is run; see ``timing.time_runs``."""

    warm_up: int
    repeats: int
    calls: int


def scalars_in_fewest_pages(case: cases.Case) -> tuple[int, dict]:
    """Pages that the case needs, and its scalar operands in a cache of that size."""
    page_size = case.shape.page_size
    num_pages = sum(-(-s.kv_len // page_size) for s in case.sequences)
    shape = dataclasses.replace(case.shape.rpa_shape, num_pages=num_pages)
    is_chunked = case.shape.chunk_prefill_size is not None
    operands = workloads.scalar_operands(shape, case.sequences, chunked=is_chunked)
    return num_pages, operands


def time_with_jax(
    case: cases.Case,
    repetition: Repetition,
    attention: Callable | None = None,
) -> tuple[str, timing.Timing]:
    """Times a case; returns the chip, too.

    Args:
      case: What to run.
      repetition: How often.
      attention: By default the kernel.
    """
    import functools

    import jax
    import jax.numpy as jnp

    from jax_kernels.ragged_paged_attention import (
        kv_cache_shape,
        ragged_paged_attention,
    )

    kind = jax.devices()[0].device_kind
    attend = attention or functools.partial(ragged_paged_attention, chip=kind)
    model, shape = case.shape.model, case.shape
    num_pages, scalars = scalars_in_fewest_pages(case)
    cache_shape = kv_cache_shape(
        num_pages,
        shape.page_size,
        model.num_kv_heads,
        model.head_dim,
        jnp.dtype(shape.cache_dtype),
    )
    keys = jax.random.split(jax.random.key(0), 4)

    def tokens(key, num_heads: int) -> jax.Array:
        sizes = (shape.num_tokens, num_heads, model.head_dim)
        return jax.random.normal(key, sizes, jnp.dtype(shape.q_dtype))

    @jax.jit
    def fill(key) -> jax.Array:
        page = jax.random.normal(key, cache_shape[1:]).astype(shape.cache_dtype)
        return jnp.broadcast_to(page, cache_shape)

    queries = tokens(keys[0], model.num_q_heads)
    new = [tokens(key, model.num_kv_heads) for key in keys[1:3]]
    batch = [jnp.asarray(scalars[index]) for index in range(4)]
    sinks = jnp.zeros(model.num_q_heads) if model.with_sinks else None

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def loop(calls: int, kv_cache, queries, new, batch, sinks):
        def body(_, kv_cache):
            arguments = (queries, *new, kv_cache, *batch, sinks)
            return attend(*arguments, **shape.options)[-1]

        return jax.lax.fori_loop(0, calls, body, kv_cache)

    state = [fill(keys[3])]

    def run(calls: int) -> None:
        state[0] = loop(calls, state[0], queries, new, batch, sinks)

    return kind, timing.time_runs(
        run, lambda: state[0].block_until_ready(), **vars(repetition)
    )


def time_with_torch(
    case: cases.Case, repetition: Repetition
) -> tuple[str, timing.Timing]:
    """Times a case through ``torch.ops.rpa``; returns the chip, too."""
    import torch
    import torch_xla

    import torch_rpa
    from torch_rpa import ops
    from torch_rpa.bridges import torch_xla as xla_bridge

    device = torch_xla.device()
    model, shape = case.shape.model, case.shape
    num_pages, scalars = scalars_in_fewest_pages(case)
    q_dtype = getattr(torch, shape.q_dtype)

    def tokens(num_heads: int) -> torch.Tensor:
        sizes = (shape.num_tokens, num_heads, model.head_dim)
        return torch.randn(sizes, device=device).to(q_dtype)

    q, k, v = (tokens(n) for n in (model.num_q_heads, *2 * (model.num_kv_heads,)))
    cache_shape = torch_rpa.kv_cache_shape(
        num_pages,
        shape.page_size,
        model.num_kv_heads,
        model.head_dim,
        dtype=getattr(torch, shape.cache_dtype),
    )
    page = torch.randn(cache_shape[1:], device=device)
    page = page.to(getattr(torch, shape.cache_dtype))
    kv_cache = page.expand(cache_shape).contiguous()
    batch = [torch.from_numpy(scalars[index]).to(device) for index in range(4)]
    sinks = torch.zeros(model.num_q_heads, device=device) if model.with_sinks else None
    torch_xla.sync(wait=True)

    operators = ops.WITH_LSE if shape.return_lse else ops.WITHOUT_LSE
    options = {name: x for name, x in shape.options.items() if name != "return_lse"}

    def run(calls: int) -> None:
        for _ in range(calls):
            operators.public(q, k, v, kv_cache, *batch, sinks, **options)
        torch_xla.sync()

    chip = xla_bridge.device_target(device).chip or "unknown"
    return chip, timing.time_runs(
        run, lambda: torch_xla.sync(wait=True), **vars(repetition)
    )

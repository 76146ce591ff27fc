"""The public function: validate, choose block sizes, view the arrays, launch."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from jax_kernels import chips
from jax_kernels.contract.options import Attend
from jax_kernels.ragged_paged_attention import (
    block_sizes as block_sizes_lib,
)
from jax_kernels.ragged_paged_attention import scales, validation
from jax_kernels.ragged_paged_attention.config import (
    AttentionSpec,
    BlockSizes,
    KernelConfig,
)
from jax_kernels.ragged_paged_attention.kernel import launch as launch_lib
from jax_kernels.ragged_paged_attention.kernel import refs


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    kv_cache: jax.Array,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
    sinks: jax.Array | None = None,
    *,
    sm_scale: float = 1.0,
    causal: bool = True,
    causal_block: int | None = None,
    sliding_window: int | None = None,
    attend: Attend = "all",
    soft_cap: float | None = None,
    q_scale: float | jax.Array | None = None,
    k_scale: float | jax.Array | None = None,
    v_scale: float | jax.Array | None = None,
    update_kv_cache: bool = True,
    chunk_prefill_size: int | None = None,
    decode_q_len: int = 1,
    probabilities_dtype: DTypeLike | None = None,
    out_dtype: DTypeLike | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    validate: bool = False,
    block_sizes: BlockSizes | None = None,
    vmem_limit_bytes: int | None = None,
    chip: str | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, ...]:
    """Attends ragged queries to a paged cache and adds the new tokens to it.

    Let T be query tokens (padded), S sequences (padded), P pages per sequence, N
    pages, Hq and Hkv heads, G = Hq // Hkv, D head_dim. Sequence s owns the rows
    ``cu_q_lens[s] .. cu_q_lens[s + 1]`` of q, k and v; its new tokens are the last of
    its ``kv_lens[s]`` positions. The token at position t lives in
    slot ``t % page_size`` of page ``page_indices[s * P + t // page_size]``.

    For a query at position i and head h, with g = h // G::

        score[j] = sm_scale * q_i . k_j[g]      or soft_cap * tanh(that / soft_cap)
        lse_i    = log(sum_j exp(score[j]) + exp(sinks[h]))
        out_i    = sum_j exp(score[j] - lse_i) v_j[g]

    over the visible positions j: ``j < kv_len``, ``j <= i`` if causal, and
    ``j > i - sliding_window`` if there is a window. With causal blocks it is
    ``j // causal_block <= i // causal_block`` in the place of ``j <= i``.

    Args:
      q: bf16 or f32 [T, Hq, D], Hq a multiple of Hkv, 32 <= D <= 512.
      k: [T, Hkv, D], the dtype of ``q``. Without an update both ``k`` and ``v`` may be
        None; they are not used.
      v: Like ``k``.
      kv_cache: ``kv_cache_shape(...)``; bf16, f32, float8_e4m3fn, float8_e5m2 or
        int8. Donate it: the output is the same memory. Dead slots may hold anything,
        NaN included. A NaN in a live slot of float8_e4m3fn counts as 480 on v5e and
        v6e, whose own e4m3 has that number there.
      kv_lens: i32[S], tokens per sequence, the new ones included.
      page_indices: i32[S * P], row-major; entries past the live pages are never used.
      cu_q_lens: i32[S + 1], increasing from 0.
      distribution: i32[3] (i, j, k): sequences [0, i) have at most ``decode_q_len``
        queries, [i, j) have ``chunk_prefill_size``, [j, k) any number; the rest is
        padding, whose metadata is ignored. Without a chunk size, [i, j) is served like
        [j, k). A sequence without a query is skipped wherever it stands.
      sinks: f32[Hq], a logit per head that joins the denominator, or None. +inf takes
        all the weight, so that the head gives zeros; -inf takes none.
      sm_scale: Factor of the scores, usually D ** -0.5: 0, or from 2**-120 to 2**120
        in size, negative ones included.
      causal: Whether queries see only keys up to their own position.
      causal_block: With ``causal``, queries see all keys of their own block of so many
        positions, a power of two, and of those before, as in block diffusion. Keys that
        come in a later step are not seen: pass the tokens of a block in one step.
      sliding_window: Number of positions seen, the query's own included. A window as
        long as the context sees all.
      attend: Of these positions, see ``"all"``, those whose tokens were in the
        ``"cache"`` before this call, ``j < kv_len - q_len``, or those that are
        ``"new"`` in it. All new tokens are written whatever it is.
      soft_cap: Bound of the scores.
      q_scale: Quantises queries to the dtype of an 8-bit cache, as
        ``q * float32(1 / q_scale)``, and multiplies there. This and the next two are
        numbers, or arrays f32[] or f32[Hkv], by key head: then one program serves all
        values. The inverse of an array's number is rounded to nearest, so that it is
        that of the equal Python number. Numbers of an array must be positive, and from
        2**-120 to 2**120, which only ``validate`` checks.
      k_scale: New keys are stored as ``k * float32(1 / k_scale)``, and scores are
        multiplied by ``k_scale``. The inverse is computed in float64, the product in
        float32; it is clipped to the finite range of an 8-bit cache, then rounded to
        nearest, ties to even. The same bytes come out of every implementation,
        but for NaN, which stays NaN in one of its codes.
      v_scale: New values are stored as ``v * float32(1 / v_scale)`` likewise, and the
        output is multiplied by ``v_scale``.
      update_kv_cache: Whether new keys and values are written. If not, everything is
        read from the cache, which is returned as it is and not aliased.
      chunk_prefill_size: Query tokens of each sequence in [i, j).
      decode_q_len: Most query tokens of a sequence in [0, i), from 1 to 16. More than
        one is for sequences of few new tokens at long contexts: drafts to verify, last
        chunks of a prefill, short suffixes. All have the rows of as many tokens, so
        take the least that serves.
      probabilities_dtype: float8_e4m3fn lets prefill round probabilities to it before
        they meet the values, for which the cache must be of that dtype too. TPU7x then
        multiplies at twice the rate; other chips round nothing. A weight is off by up
        to about 2**-4 of itself, or 2**-14 of the largest. None, the default, never
        rounds so.
      out_dtype: bf16 or f32; that of ``q`` by default.
      return_lse: Return the ``lse`` above as well, with which
        ``merge_attention`` joins attention over parts of the keys.
      batch_invariant: A query gets the same bits whatever else is in the batch, in
        whichever range its sequence is, however its sequence was cut into steps, and
        whatever T, S and P are: its output is a function of its own numbers, of the
        keys and values that it sees, of the heads, the dtypes, the page size and the
        chip. All sequences are then served like the mixed ones, with blocks of one
        size, which is slower for decodes above all. With ``block_sizes``, of the same
        sizes in all calls.
      validate: Also check the numbers in lengths, page table and distribution, such as
        a slot that one sequence writes and another reads, and those of scales. It waits
        for the arrays, so it is for debugging, outside ``jax.jit``.
      block_sizes: Tile sizes; by default chosen to fit ``chip``.
      vmem_limit_bytes: VMEM for the kernel; by default most of what ``chip`` has.
      chip: ``"v5e"``, ``"v6e"``, ``"tpu7x"`` or a device kind. By default limits
        that every chip meets. Nothing is looked up, so tracing opens no device. On a
        machine without a TPU, JAX from 0.11.2 on lowers for a TPU only if it is given.
      interpret: True, or Pallas TPU interpret parameters, to run on a CPU.

    Returns:
      The output [T, Hq, D], zeros in rows past the last live sequence and in rows that
      see no key; with ``return_lse`` the lse f32[T, Hq], minus infinity in the same
      rows, but for a sink; and the cache.

    Raises:
      ValueError: An argument is wrong, or sizes do not fit VMEM or SMEM.
      NotImplementedError: An argument that has a meaning but is not supported; the
        message names another way.
    """
    arguments, options = validation.arguments_and_options(locals())
    problem = validation.validate_static(arguments, options)
    if validate:
        validation.validate_values(arguments, options)
    options = options.for_context(problem.max_kv_len)
    spec = AttentionSpec(
        **vars(options),
        has_sinks=sinks is not None,
        array_options=arguments.array_options,
    )
    chip_spec = chips.find_chip(chip)
    if vmem_limit_bytes is not None:
        chip_spec = dataclasses.replace(
            chip_spec,
            vmem_bytes=int(vmem_limit_bytes / block_sizes_lib.VMEM_LIMIT_SHARE),
        )
    else:
        vmem_limit_bytes = int(chip_spec.vmem_bytes * block_sizes_lib.VMEM_LIMIT_SHARE)
    if block_sizes is not None and not isinstance(block_sizes, BlockSizes):
        raise ValueError(f"block_sizes must be BlockSizes or None, got {block_sizes!r}")
    if block_sizes is None:
        block_sizes = block_sizes_lib.choose(problem, spec, chip_spec)
    config = block_sizes_lib.make_config(
        problem,
        spec,
        block_sizes,
        spec.chunk_prefill_size,
        bool(interpret),
        chip_spec,
    )
    block_sizes_lib.check_fits(problem, config, chip_spec, vmem_limit_bytes)

    result = launch_lib.launch(
        refs.ScalarRefs(kv_lens, page_indices, cu_q_lens, distribution),
        refs.Inputs(
            queries=_queries(q, config),
            keys=_new_tokens(k, config) if spec.update_kv_cache else None,
            values=_new_tokens(v, config) if spec.update_kv_cache else None,
            kv_cache=kv_cache,
            sinks=sinks,
            head_factors=scales.head_factors(
                config.numerics.head_factors,
                scales.of_heads(arguments, problem.num_kv_heads),
            ),
        ),
        config,
        vmem_limit_bytes=vmem_limit_bytes,
        interpret_params=_interpret_params(interpret),
    )
    out = _without_io_heads(config.out_layout.heads(result.out), config)
    out = out[..., : config.head_dim]
    new_cache = result.kv_cache if spec.update_kv_cache else kv_cache
    if result.lse is None:
        return out, new_cache
    lse = config.lse_layout.heads(result.lse).reshape(problem.num_tokens, -1)
    return out, lse[:, : problem.num_q_heads], new_cache


def _queries(x: jax.Array, config: KernelConfig) -> jax.Array:
    """Queries in the view that ``refs.Inputs`` names."""
    return config.query_layout.view(_with_io_heads(_widen(x, config), config))


def _new_tokens(x: jax.Array | None, config: KernelConfig) -> jax.Array | None:
    """New keys or values in the view that ``refs.Inputs`` names."""
    return None if x is None else config.new_token_layout.view(_widen(x, config))


def _with_io_heads(x: jax.Array, config: KernelConfig) -> jax.Array:
    """[T, Hq, lanes] with the heads that are nothing, see ``KernelConfig.io_group``."""
    missing = config.io_group - config.group
    if not missing:
        return x
    num_tokens, _, lanes = x.shape
    x = x.reshape(num_tokens, config.num_kv_heads, config.group, lanes)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, missing), (0, 0)])
    return x.reshape(num_tokens, config.num_io_heads, lanes)


def _without_io_heads(x: jax.Array, config: KernelConfig) -> jax.Array:
    """Inverse of ``_with_io_heads``."""
    if config.io_group == config.group:
        return x
    num_tokens, _, lanes = x.shape
    x = x.reshape(num_tokens, config.num_kv_heads, config.io_group, lanes)
    return x[:, :, : config.group].reshape(num_tokens, config.num_q_heads, lanes)


def _widen(x: jax.Array, config: KernelConfig) -> jax.Array:
    """[..., D] to [..., io_lanes], with zeros behind."""
    width = config.io_lanes - x.shape[-1]
    return jnp.pad(x, [(0, 0), (0, 0), (0, width)]) if width else x


def _interpret_params(
    interpret: bool | pltpu.InterpretParams,
) -> pltpu.InterpretParams | None:
    if isinstance(interpret, bool):
        return pltpu.InterpretParams() if interpret else None
    return interpret

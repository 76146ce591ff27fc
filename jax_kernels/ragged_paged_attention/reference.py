"""Ragged paged attention in plain JAX: the specification, and the CPU implementation.

Shapes are static and every length is traced, so one compilation serves all steps.
Arithmetic is float32 throughout. The work done follows the live lengths: blocks of
queries of one sequence attend to blocks of its pages, with an online softmax::

    for each live sequence:
      for each block of block_q queries:
        for each block of pages that some query of the block can see:
          gather pages -> scores -> running maximum, sum and accumulator
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jax_kernels.contract import AttentionOptions
from jax_kernels.contract.options import Attend
from jax_kernels.ragged_paged_attention import layout, scales, validation

# Keys per inner step, and the most queries per block. Neither changes the result
# beyond the order of float32 sums.
_BLOCK_KV = 512
_MAX_BLOCK_Q = 64


class _LiveSequences(NamedTuple):
    """The metadata, with every sequence at or past the live ones made empty."""

    count: jax.Array  # i32[]
    q_starts: jax.Array  # i32[S]
    q_lens: jax.Array  # i32[S]
    kv_lens: jax.Array  # i32[S]
    page_table: jax.Array  # i32[S, P]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything about the attention that is static."""

    problem: validation.Problem
    options: AttentionOptions

    @property
    def block_q(self) -> int:
        """A power of two near the mean query length: 1 for a batch of decodes.

        With ``batch_invariant`` it is 1.
        """
        if self.options.batch_invariant:
            return 1
        mean = max(self.problem.num_tokens // self.problem.num_sequences, 1)
        return min(1 << (mean.bit_length() - 1), _MAX_BLOCK_Q)

    @property
    def block_pages(self) -> int:
        """Pages per inner step."""
        num_pages = max(_BLOCK_KV // self.problem.cache.page_size, 1)
        if self.options.batch_invariant:
            return num_pages
        return min(num_pages, self.problem.pages_per_sequence)

    @property
    def block_kv(self) -> int:
        """Keys per inner step."""
        return self.block_pages * self.problem.cache.page_size


class _QueryBlock(NamedTuple):
    """Some consecutive queries of one sequence, and the keys that any of them sees."""

    first_row: jax.Array  # i32[], row of the first query
    num_rows: jax.Array  # i32[], rows that are of this sequence
    tile: jax.Array  # f32[block_q, Hkv, G, D], scaled
    positions: jax.Array  # i32[block_q]
    first_key: jax.Array  # i32[]
    end_key: jax.Array  # i32[]


class _AttentionState(NamedTuple):
    """Online softmax of one block of queries."""

    row_max: jax.Array  # f32[Hkv, G, block_q]
    row_sum: jax.Array  # f32[Hkv, G, block_q]
    accumulator: jax.Array  # f32[Hkv, G, block_q, D]


def ragged_paged_attention_reference(
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
) -> tuple[jax.Array, ...]:
    """Appends new keys and values to a paged cache and attends to it, without Pallas.

    The arguments mean what they mean for ``api.ragged_paged_attention``, where each is
    described; ``chunk_prefill_size``, ``decode_q_len``, ``probabilities_dtype`` and the
    first two numbers of ``distribution`` do not affect the result.

    Args:
      q: [T, Hq, D]. Rows at or past ``cu_q_lens[k]`` are padding.
      k: [T, Hkv, D]. Without an update both ``k`` and ``v`` may be None.
      v: [T, Hkv, D].
      kv_cache: Paged cache, see ``layout.py``.
      kv_lens: i32[S]. Tokens of each sequence, the new ones included.
      page_indices: i32[S * P]. Row-major page table; entries past the live pages of a
        sequence are arbitrary.
      cu_q_lens: i32[S + 1]. Sequence s owns query rows
        ``cu_q_lens[s]:cu_q_lens[s + 1]``, its last positions.
      distribution: i32[3], (i, j, k): k sequences are live.
      sinks: f32[Hq]. Logit per head of an extra key whose value is zero. +inf takes all
        the weight, so that the head gives zeros.
      sm_scale: Factor of ``q . k``: 0, or from 2**-120 to 2**120 in size.
      causal: Whether a query sees only keys at or before its own position.
      causal_block: With ``causal``, queries see all keys of their own block of so many
        positions, a power of two, and of those before.
      sliding_window: Number of latest positions seen, the query's own included.
      attend: Whether "all" of these are seen, or only those that were in the "cache"
        before, or those that are "new". All new tokens are written.
      soft_cap: Scores become ``soft_cap * tanh(score / soft_cap)``.
      q_scale: Queries are quantised as ``q * float32(1 / q_scale)``. This and the next
        two may be arrays, f32[] or f32[Hkv].
      k_scale: Keys are stored as ``k * float32(1 / k_scale)``, the inverse computed in
        float64, the product in float32, clipped, rounded to nearest even.
      v_scale: Values are stored as ``v * float32(1 / v_scale)`` likewise.
      update_kv_cache: Whether keys and values are written to the cache first.
      chunk_prefill_size: Ignored.
      decode_q_len: Ignored.
      probabilities_dtype: Ignored: nothing is rounded.
      out_dtype: Dtype of the output, that of ``q`` by default.
      return_lse: Whether to return the logarithms of the denominators.
      batch_invariant: Whether a query gets the same bits in any batch: queries attend
        one by one.
      validate: Also check the numbers in the metadata, and in scales that are arrays;
        not under ``jax.jit``.

    Returns:
      The output [T, Hq, D], with ``return_lse`` the logarithms f32[T, Hq], and the
      updated cache. Padding rows, and rows that see no key, are zeros, and their
      logarithms minus infinity, but for a sink. Without an update the cache is
      ``kv_cache`` itself.

    Raises:
      ValueError: An argument is wrong.
      NotImplementedError: An argument that has a meaning but is not supported.
    """
    arguments, options = validation.arguments_and_options(locals())
    problem = validation.validate_static(arguments, options)
    if validate:
        validation.validate_values(arguments, options)
    options = options.for_context(problem.max_kv_len)
    sequences = _live_sequences(problem, kv_lens, page_indices, cu_q_lens, distribution)
    bits = _cache_to_bits(kv_cache, problem.cache)
    arrays = scales.of_heads(arguments, problem.num_kv_heads)

    def inverse(option: str) -> jax.Array | float | None:
        """Of a scale: a number, f32[1, Hkv, 1], or None if there is none."""
        if option in arrays:
            return scales.reciprocal(arrays[option])[None, :, None]
        number = getattr(options, option)
        return None if number is None else 1.0 / number

    def of_query_heads(x: jax.Array) -> jax.Array:
        """[1, Hkv, 1] to [1, Hq, 1]."""
        return jnp.repeat(x, problem.num_q_heads_per_kv_head, axis=1)

    if options.update_kv_cache:
        assert k is not None and v is not None  # validated
        stored_keys = _store(k, problem.cache, inverse("k_scale"))
        stored_values = _store(v, problem.cache, inverse("v_scale"))
        rows = _cache_rows(stored_keys, stored_values, problem.cache)
        bits = _write_rows(bits, rows, sequences, problem)
        kv_cache = _cache_from_bits(bits, problem.cache)

    q_inverse = inverse("q_scale")
    if q_inverse is not None:
        if isinstance(q_inverse, jax.Array):
            q_inverse = of_query_heads(q_inverse)
        q = _store(q, problem.cache, q_inverse)
    q = q.astype(jnp.float32) * options.score_factor
    for option in ("q_scale", "k_scale"):
        if option in arrays:
            q = q * of_query_heads(arrays[option][None, :, None])
    out, lse = _attend(
        q,
        bits,
        sequences,
        sinks,
        _Plan(problem, options),
    )
    if options.v_scale is not None:
        out = out * options.v_scale
    if "v_scale" in arrays:
        out = out * of_query_heads(arrays["v_scale"][None, :, None])
    out = out.astype(problem.out_dtype)
    return (out, kv_cache) if lse is None else (out, lse, kv_cache)


def _live_sequences(
    problem: validation.Problem,
    kv_lens: jax.Array,
    page_indices: jax.Array,
    cu_q_lens: jax.Array,
    distribution: jax.Array,
) -> _LiveSequences:
    num_sequences = problem.num_sequences
    count = jnp.clip(distribution[2], 0, num_sequences)
    is_live = jnp.arange(num_sequences, dtype=jnp.int32) < count
    return _LiveSequences(
        count=count,
        q_starts=jnp.where(is_live, cu_q_lens[:-1], 0),
        q_lens=jnp.where(is_live, cu_q_lens[1:] - cu_q_lens[:-1], 0),
        kv_lens=jnp.where(is_live, kv_lens, 0),
        page_table=page_indices.reshape(num_sequences, problem.pages_per_sequence),
    )


def _cache_to_bits(kv_cache: jax.Array, cache: layout.CacheLayout) -> jax.Array:
    """The cache as unsigned integers, [N, heads, page_size, lanes].

    XLA on CPU moves bfloat16 and float8 by way of a wider float, which changes the
    bytes of a NaN. Integers are moved as they are.
    """
    bits = lax.bitcast_convert_type(kv_cache, f"uint{8 * cache.dtype.itemsize}")
    return bits.reshape(
        cache.num_pages, cache.heads_per_page, cache.page_size, cache.lanes
    )


def _cache_from_bits(bits: jax.Array, cache: layout.CacheLayout) -> jax.Array:
    return lax.bitcast_convert_type(bits.reshape(cache.shape), cache.dtype)


def _store(
    values: jax.Array, cache: layout.CacheLayout, inverse: jax.Array | float | None
) -> jax.Array:
    """Values [T, heads, D] as the cache holds them: multiplied, clipped, cast.

    By the inverse of a scale, a number or f32[1, heads, 1]. Compilers differ in how
    they divide; they agree on a product.
    """
    if not cache.is_quantized and inverse is None:
        return values.astype(cache.dtype)
    scaled = values.astype(jnp.float32)
    if inverse is not None:
        scaled = scaled * inverse
    if cache.dtype == jnp.int8:
        limits = jnp.iinfo(cache.dtype)
        scaled = jnp.clip(jnp.round(scaled), limits.min, limits.max)
    elif cache.is_quantized:
        limits = jnp.finfo(cache.dtype)
        scaled = jnp.clip(scaled, float(limits.min), float(limits.max))
    return scaled.astype(cache.dtype)


def _cache_rows(
    keys: jax.Array, values: jax.Array, cache: layout.CacheLayout
) -> jax.Array:
    """[T, Hkv, D] keys and values as cache rows [T, heads, lanes], padding zero."""
    width = cache.value_lane if cache.is_fused_kv else cache.lanes
    padding = ((0, 0), (0, 0), (0, width - cache.head_dim))
    head_or_lane = 2 if cache.is_fused_kv else 1
    return jnp.concatenate(
        [jnp.pad(keys, padding), jnp.pad(values, padding)], axis=head_or_lane
    )


def _write_rows(
    bits: jax.Array,
    rows: jax.Array,
    sequences: _LiveSequences,
    problem: validation.Problem,
) -> jax.Array:
    """Puts row t into the slot of token t; rows that belong to no slot are dropped.

    Args:
      bits: u[N, heads, page_size, lanes].
      rows: [T, heads, lanes], in the dtype of the cache.
      sequences: Live sequences.
      problem: Static sizes.
    """
    cache = problem.cache
    token = jnp.arange(problem.num_tokens, dtype=jnp.int32)[:, None]  # [T, 1]
    first = sequences.q_starts[None, :]
    is_owner = (token >= first) & (token < first + sequences.q_lens[None, :])  # [T, S]
    owner = jnp.argmax(is_owner, axis=1)
    first_position = sequences.kv_lens - sequences.q_lens
    position = (first_position - sequences.q_starts)[owner] + token[:, 0]
    column = position // cache.page_size
    page = sequences.page_table[
        owner, jnp.clip(column, 0, problem.pages_per_sequence - 1)
    ]
    is_written = (
        is_owner.any(axis=1)
        & (position >= 0)
        & (column < problem.pages_per_sequence)
        & (page >= 0)
    )
    # A page past the end is what "drop" drops; a negative one would wrap around.
    page = jnp.where(is_written, page, cache.num_pages)
    return bits.at[page, :, position % cache.page_size].set(
        lax.bitcast_convert_type(rows, bits.dtype), mode="drop"
    )


def _attend(
    queries: jax.Array,
    bits: jax.Array,
    sequences: _LiveSequences,
    sinks: jax.Array | None,
    plan: _Plan,
) -> tuple[jax.Array, jax.Array | None]:
    """Attention of scaled queries f32[T, Hq, D] to the cache; float32[T, Hq, D].

    And the logarithms of the denominators, float32[T, Hq], if they are asked for.
    """
    problem = plan.problem
    # A block may reach past the last token; it never moves back to fit.
    tail = ((0, plan.block_q), (0, 0), (0, 0))
    queries = jnp.pad(queries, tail)
    initial = _initial_state(sinks, plan)
    padding = -problem.pages_per_sequence % plan.block_pages
    page_table = jnp.pad(sequences.page_table, ((0, 0), (0, padding)))

    def put(whole, tile, block):
        previous = lax.dynamic_slice_in_dim(whole, block.first_row, plan.block_q)
        is_own = jnp.arange(plan.block_q) < block.num_rows
        is_own = is_own.reshape(-1, *[1] * (whole.ndim - 1))
        tile = jnp.where(is_own, tile.reshape(previous.shape), previous)
        return lax.dynamic_update_slice_in_dim(whole, tile, block.first_row, 0)

    def attend_query_block(index, results, sequence):
        block = _query_block(queries, sequences, sequence, index, plan)
        state = lax.fori_loop(
            block.first_key // plan.block_kv,
            _cdiv(block.end_key, plan.block_kv),
            lambda index, state: _attend_to_pages(
                state, block, bits, page_table[sequence], index, plan
            ),
            initial,
        )
        out, lse = results
        if lse is not None:
            lse = put(lse, _log_sum(state), block)
        return put(out, _normalize(state), block), lse

    def attend_sequence(sequence, results):
        num_blocks = _cdiv(sequences.q_lens[sequence], plan.block_q)
        return lax.fori_loop(
            0,
            jnp.where(sequences.kv_lens[sequence] > 0, num_blocks, 0),
            functools.partial(attend_query_block, sequence=sequence),
            results,
        )

    lse = jnp.full(queries.shape[:2], -jnp.inf) if plan.options.return_lse else None
    results = jnp.zeros(queries.shape), lse
    out, lse = lax.fori_loop(0, sequences.count, attend_sequence, results)
    num_tokens = problem.num_tokens
    return out[:num_tokens], None if lse is None else lse[:num_tokens]


def _initial_state(sinks: jax.Array | None, plan: _Plan) -> _AttentionState:
    """The state that has seen the sink, if there is one, and no key."""
    problem = plan.problem
    heads = (problem.num_kv_heads, problem.num_q_heads_per_kv_head)
    if sinks is None:
        sinks = jnp.full(problem.num_q_heads, -jnp.inf)
    row_max = jnp.broadcast_to(sinks.reshape(*heads, 1), (*heads, plan.block_q))
    return _AttentionState(
        row_max=row_max,
        row_sum=jnp.where(jnp.isneginf(row_max), 0.0, 1.0),
        accumulator=jnp.zeros((*row_max.shape, problem.head_dim)),
    )


def _query_block(
    queries: jax.Array,
    sequences: _LiveSequences,
    sequence: jax.Array,
    index: jax.Array,
    plan: _Plan,
) -> _QueryBlock:
    """Block ``index`` of the queries of a sequence."""
    problem = plan.problem
    offset = index * plan.block_q
    first_row = sequences.q_starts[sequence] + offset
    q_len = sequences.q_lens[sequence]
    kv_len = sequences.kv_lens[sequence]
    if not plan.options.needs_no_new_tokens:
        kv_len = jnp.minimum(kv_len, problem.max_kv_len)
    num_rows = jnp.minimum(q_len - offset, plan.block_q)
    first_position = kv_len - q_len + offset
    first_key, end_key = jnp.int32(0), kv_len
    if plan.options.causal:
        end_key = _seen_end(first_position + num_rows, plan.options)
        end_key = jnp.minimum(kv_len, end_key)
    if plan.options.sliding_window is not None:
        first_key = jnp.maximum(first_position - plan.options.sliding_window + 1, 0)
    if plan.options.attend == "cache":
        end_key = jnp.minimum(end_key, kv_len - q_len)
        end_key = jnp.minimum(end_key, problem.max_kv_len)
    elif plan.options.attend == "new":
        first_key = jnp.maximum(first_key, kv_len - q_len)
    tile = lax.dynamic_slice_in_dim(queries, first_row, plan.block_q)
    return _QueryBlock(
        first_row=first_row,
        num_rows=num_rows,
        tile=tile.reshape(
            plan.block_q,
            problem.num_kv_heads,
            problem.num_q_heads_per_kv_head,
            problem.head_dim,
        ),
        positions=first_position + jnp.arange(plan.block_q, dtype=jnp.int32),
        first_key=first_key,
        end_key=end_key,
    )


def _attend_to_pages(
    state: _AttentionState,
    block: _QueryBlock,
    bits: jax.Array,
    page_row: jax.Array,
    index: jax.Array,
    plan: _Plan,
) -> _AttentionState:
    """Adds block ``index`` of the pages i32[P, padded] of a sequence to the state."""
    cache = plan.problem.cache
    first_column = index * plan.block_pages
    pages = lax.dynamic_slice_in_dim(page_row, first_column, plan.block_pages)
    column = first_column + jnp.arange(plan.block_pages, dtype=jnp.int32)
    # Ids past the live pages are garbage: read any page instead and mask it.
    pages = jnp.where(column * cache.page_size < block.end_key, pages, 0)
    keys, values = _gather(bits, pages, cache)

    position = index * plan.block_kv + jnp.arange(plan.block_kv, dtype=jnp.int32)
    is_used = (position >= block.first_key) & (position < block.end_key)
    # Dead slots may hold NaN, and 0 * NaN is NaN.
    keys = jnp.where(is_used[None, :, None], keys, 0.0)
    values = jnp.where(is_used[None, :, None], values, 0.0)
    scores = jnp.einsum(
        "qhgd,hkd->hgqk", block.tile, keys, precision=lax.Precision.HIGHEST
    )
    if plan.options.soft_cap is not None:
        scores = plan.options.soft_cap * jnp.tanh(scores / plan.options.soft_cap)
    query_position = block.positions[:, None]
    position = position[None, :]
    is_visible = jnp.broadcast_to(is_used[None, :], (plan.block_q, plan.block_kv))
    if plan.options.causal:
        is_visible &= position < _seen_end(query_position + 1, plan.options)
    if plan.options.sliding_window is not None:
        is_visible &= position > query_position - plan.options.sliding_window
    scores = jnp.where(is_visible[None, None], scores, -jnp.inf)
    return _accumulate(state, scores, values)


def _gather(
    bits: jax.Array, pages: jax.Array, cache: layout.CacheLayout
) -> tuple[jax.Array, jax.Array]:
    """Keys and values f32[Hkv, tokens, D] of the given pages."""
    tile = bits.at[pages].get(mode="clip")  # [pages, heads, page_size, lanes]
    tile = lax.bitcast_convert_type(tile, cache.dtype).astype(jnp.float32)
    tile = tile.swapaxes(0, 1).reshape(cache.heads_per_page, -1, cache.lanes)
    head_dim, value_lane = cache.head_dim, cache.value_lane
    keys = tile[: cache.num_kv_heads, :, :head_dim]
    values = tile[-cache.num_kv_heads :, :, value_lane : value_lane + head_dim]
    return keys, values


def _accumulate(
    state: _AttentionState, scores: jax.Array, values: jax.Array
) -> _AttentionState:
    """Adds masked scores f32[Hkv, G, q, k] and values f32[Hkv, k, D] to the state."""
    row_max = jnp.maximum(state.row_max, scores.max(axis=-1))
    # While nothing is visible the maximum is -inf, and -inf - (-inf) is NaN.
    finite_max = jnp.where(jnp.isneginf(row_max), 0.0, row_max)
    probabilities = jnp.exp(scores - finite_max[..., None])
    # A sink of +inf stays the maximum, and inf - inf is NaN as well.
    is_same = state.row_max == row_max
    correction = jnp.exp(jnp.where(is_same, 0.0, state.row_max - finite_max))
    update = jnp.einsum(
        "hgqk,hkd->hgqd", probabilities, values, precision=lax.Precision.HIGHEST
    )
    return _AttentionState(
        row_max=row_max,
        row_sum=state.row_sum * correction + probabilities.sum(axis=-1),
        accumulator=state.accumulator * correction[..., None] + update,
    )


def _normalize(state: _AttentionState) -> jax.Array:
    """Output f32[q, Hkv, G, D]; rows that saw no key are zeros."""
    is_empty = state.row_sum == 0.0
    row_sum = jnp.where(is_empty, 1.0, state.row_sum)
    out = state.accumulator / row_sum[..., None]
    return jnp.moveaxis(out, 2, 0)


def _log_sum(state: _AttentionState) -> jax.Array:
    """The logarithm of the denominator f32[q, Hkv, G]."""
    return jnp.moveaxis(state.row_max + jnp.log(state.row_sum), 2, 0)


def _seen_end(query_end: jax.Array, options: AttentionOptions) -> jax.Array:
    """The position after the last that causal queries before ``query_end`` see."""
    if options.causal_block is None:
        return query_end
    return _cdiv(query_end, options.causal_block) * options.causal_block


def _cdiv(value: jax.Array, divisor: int) -> jax.Array:
    return (value + divisor - 1) // divisor

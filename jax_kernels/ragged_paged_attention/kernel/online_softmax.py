"""Softmax over keys that arrive block by block, on plain arrays.

Scores are in units of log2 (the scale holds log2(e)), so ``exp2`` is exp. For every
query row (here just *row*) the state holds the running maximum ``m``, the sum ``l`` of
``exp2(s - m)`` and the weighted values ``acc``. Milakov and Gimelshein, arXiv
1805.02867.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from jax_kernels.ragged_paged_attention.layout import LANES
from jax_kernels.ragged_paged_attention.numerics import LOG2_E, Numerics

# The maximum of a row that has seen no key. It is finite, so that a masked score
# of -inf gives exp2(-inf - m) = 0 and never (-inf) - (-inf).
NO_KEY_MAX = float(np.finfo(np.float32).min) / 2
MASKED_SCORE = float("-inf")
# The largest logit of a sink; no score comes near it.
SINK_MAX = float(np.finfo(np.float32).max)

# Keys of the first block that fix the maximum of an anchored row: one register of
# scores.
ANCHOR_KEYS = LANES
# Sums of anchored rows are brought back to about 1 above the first limit. Above the
# second one, which they can only pass within one block, they may be infinite. What was
# summed before is then less than 2**-32 of the sum.
MAX_SUM, MAX_WHOLE_SUM = 2.0**32, 2.0**64
# Less than the sum of any row that saw a key, or has a sink; its inverse is finite.
MIN_SUM = 2.0**-100
# Float8 probabilities are this power of two times those of an anchor that is a
# maximum: e4m3fn has numbers up to 448, and all bits of them down to 2**-6. So a row's
# scores may lie 4.8 above its anchor, and lose bits from 10 below it.
FLOAT8_DOUBLINGS = 4.0
# Of probabilities in bfloat16, one after the other, before their sum is f32.
BFLOAT16_ADDITIONS = 3


class SoftmaxState(NamedTuple):
    """Running state of some query rows; f32 whatever the output is."""

    m: jax.Array  # f32[rows, 128], all lanes equal
    l: jax.Array  # noqa: E741  f32[rows, 128], all lanes equal, or see spread_sums
    acc: jax.Array  # f32[rows, lanes]


def dot_f32(lhs: jax.Array, rhs: jax.Array, rhs_contract: int) -> jax.Array:
    """Product summed in f32, at full precision when the operands are f32."""
    precision = (
        jax.lax.Precision.HIGHEST
        if lhs.dtype == jnp.float32
        else jax.lax.Precision.DEFAULT
    )
    integers = jnp.issubdtype(lhs.dtype, jnp.integer)
    product = jax.lax.dot_general(
        lhs,
        rhs,
        (((1,), (rhs_contract,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.int32 if integers else jnp.float32,
    )
    return product.astype(jnp.float32)


def score_tile(
    q: jax.Array,  # [query rows, lanes], already multiplied
    k: jax.Array,  # [block_kv, lanes]
    numerics: Numerics,
) -> jax.Array:  # f32[rows, block_kv], units of log2
    """Scores of some query rows with one block."""
    return finish_scores(products(q, k), numerics)


def products(q: jax.Array, k: jax.Array) -> jax.Array:
    """Every query with every key: [rows, lanes] and [keys, lanes] to f32[rows, keys]"""
    return dot_f32(q, k, rhs_contract=1)


def finish_scores(scores: jax.Array, numerics: Numerics) -> jax.Array:
    """What is left to do to products before the softmax."""
    if numerics.score_multiplier != 1.0:
        scores = scores * numerics.score_multiplier
    if numerics.score_cap is not None:
        scores = jnp.tanh(scores) * numerics.score_cap
    return scores


def sink_logit(sink: jax.Array) -> jax.Array:
    """The logit of a sink in units of log2, as the maximum that a row starts from.

    It is made finite, so that no maximum is taken from itself: infinity leaves every
    key without weight, and minus infinity is less than every key.
    """
    return jnp.clip(sink * LOG2_E, NO_KEY_MAX, SINK_MAX)


def probabilities(
    scores: jax.Array,  # f32[rows, block_kv]
    m_before: jax.Array,  # f32[rows, 128]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unnormalised probabilities of some query rows with one block.

    Returns:
      p f32[rows, block_kv]; the new maximum; and the correction that brings sums to
      it, both f32[rows, 128].
    """
    m = jnp.maximum(m_before, jnp.max(scores, axis=1, keepdims=True))
    return probabilities_at(scores, m), m, jnp.exp2(m_before - m)


def probabilities_at(scores: jax.Array, m: jax.Array) -> jax.Array:
    """f32[rows, keys]: the same with a maximum, or an anchor, that is known."""
    return jnp.exp2(scores - across(m, scores.shape[1]))


def float8_probabilities_at(
    scores: jax.Array,  # f32[rows, keys]
    m: jax.Array,  # f32[rows, 128]
    numerics: Numerics,
) -> jax.Array:
    """float8[rows, keys]: the same, rounded.

    Scores and anchors lack ``exponent_multiplier``. The exponents are bfloat16: they
    are off by less than 2**-7 of their size, which changes a probability by less than
    the rounding to e4m3fn does, as long as it counts. What is too large for e4m3fn
    becomes NaN, and its row is served again.
    """
    exponents = (scores - across(m, scores.shape[1])).astype(jnp.bfloat16)
    if numerics.exponent_multiplier != 1.0:
        exponents = exponents * jnp.bfloat16(numerics.exponent_multiplier)
    return jnp.exp2(exponents).astype(numerics.float8_probabilities)


def sum_float8(p: jax.Array) -> jax.Array:
    """Sums of rounded probabilities, the weights of the values, in parts.

    Eight of them are added in bfloat16, whose roundings are a fraction of theirs.

    Args:
      p: float8[rows, keys].

    Returns:
      f32[rows, 128], of which a row's sum is the sum.
    """
    num_rows, num_keys = p.shape
    if num_keys % LANES:
        row_sum = jnp.sum(p.astype(jnp.float32), axis=1, keepdims=True)
        return jnp.broadcast_to(row_sum * (1.0 / LANES), (num_rows, LANES))
    parts = jnp.split(p.astype(jnp.bfloat16), num_keys // LANES, axis=1)
    for _ in range(BFLOAT16_ADDITIONS):
        if len(parts) % 2:
            break
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return functools.reduce(jnp.add, [part.astype(jnp.float32) for part in parts])


def whole_sum(l: jax.Array, numerics: Numerics) -> jax.Array:  # noqa: E741
    """f32[rows, 128], all lanes equal: sums from those of a state."""
    if not numerics.sums_are_parts:
        return l
    return jnp.broadcast_to(jnp.sum(l, axis=1, keepdims=True), l.shape)


def part_sum(l: jax.Array, numerics: Numerics) -> jax.Array:  # noqa: E741
    """Inverse of ``whole_sum``: equal parts."""
    return l * (1.0 / LANES) if numerics.sums_are_parts else l


def anchor(scores: jax.Array, m_start: jax.Array) -> jax.Array:
    """The anchor of rows, f32[rows, 128]: of the first keys that they see.

    The softmax is the same for any number in the place of the maximum, up to rounding,
    as long as no sum leaves the range of f32 (``are_in_range``). A lower one than the
    maximum is as good as long as a later block may not go back to it.

    Args:
      scores: f32[rows, keys] of their first block. Each row sees one of its first
        ``ANCHOR_KEYS``, or has a sink.
      m_start: f32[rows, 128], the logit of a sink, or ``NO_KEY_MAX``.
    """
    first = scores[:, :ANCHOR_KEYS]
    return jnp.maximum(m_start, jnp.max(first, axis=1, keepdims=True))


def are_in_range(sums: jax.Array) -> jax.Array:
    """bool: whether no anchored row, of some whose sums were added, needs recovery."""
    # Infinity and NaN, which all sums pass on, are not in range.
    return jnp.max(sums) <= MAX_SUM


def is_lost(l: jax.Array) -> jax.Array:  # noqa: E741
    """f32[rows, 128]: 1 for anchored rows whose last block has to be computed again."""
    return jnp.where(l <= MAX_WHOLE_SUM, 0.0, 1.0)


def is_left(l: jax.Array) -> jax.Array:  # noqa: E741
    """f32[rows, 128]: 1 for rows that recovery leaves with ``batch_invariant``.

    Recovery starts for the sums of many rows together. A row may only be changed if its
    own sum would have started it, with room for how the check rounds.
    """
    return jnp.where(l <= 2.0 * MAX_SUM, 1.0, 0.0)


def choose_rows(
    takes_first: jax.Array, first: SoftmaxState, second: SoftmaxState
) -> SoftmaxState:
    """The state of rows from the first where f32[rows, 128] is 1, else the second."""
    return SoftmaxState(
        *(
            jnp.where(across(takes_first, x.shape[1]) > 0.0, x, y)
            for x, y in zip(first, second, strict=True)
        )
    )


def renormalised(state: SoftmaxState) -> SoftmaxState:
    """The same state with a sum of about 1 where it is larger."""
    doublings = jnp.where(state.l > 1.0, jnp.log(state.l) * LOG2_E, 0.0)
    m = state.m + doublings
    # Not the doublings themselves: beside a large maximum they are rounded.
    correction = jnp.exp2(state.m - m)
    acc = state.acc * across(correction, state.acc.shape[1])
    return SoftmaxState(m, state.l * correction, acc)


def accumulate(
    p: jax.Array,  # f32[rows, block_kv]
    v: jax.Array,  # [block_kv, lanes], or [block_kv, lanes + 128] from with_ones
    correction: jax.Array,  # f32[rows, 128]
    l_before: jax.Array,  # f32[rows, 128]
    acc: jax.Array,  # f32[rows, lanes]
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """The sum of the probabilities and the weighted values, with this block's added.

    ``dtype`` is that of the probabilities in the product.
    """
    lanes = acc.shape[1]
    row_sum, weighted = sum_and_weigh(p, v, lanes, dtype)
    corrected = acc * across(correction, lanes)
    return l_before * correction + row_sum, corrected + weighted


def sum_and_weigh(
    p: jax.Array,
    v: jax.Array,
    lanes: int,
    dtype: DTypeLike,
    visible_bits: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The sum of the probabilities and the weighted values of one block.

    The sum is spread (``spread_sums``), unless ``v`` has columns of ones.

    Arguments are as in ``accumulate`` and in ``only_visible``. Bits may fit the
    probabilities, or, if ``v`` has columns of ones, those of ``dtype``.
    """
    if visible_bits is not None and visible_bits.shape == p.shape:
        p = only_visible(p, visible_bits)
        visible_bits = None
    weights = p.astype(dtype)
    if visible_bits is not None:
        weights = only_visible(weights, visible_bits)
    products = dot_f32(weights, v, rhs_contract=0)
    if v.shape[1] > lanes:
        row_sum = products[:, lanes:]
    else:
        row_sum = sum_float8(p) if p.dtype.itemsize == 1 else spread_sums(p)
    return row_sum, products[:, :lanes]


def only_visible(p: jax.Array, visible_bits: jax.Array) -> jax.Array:
    """Zeros in the place of probabilities of keys that a query does not see.

    Whatever stood there, infinity and NaN too, is gone.

    Args:
      p: [rows, keys].
      visible_bits: u32[rows // packing, keys], all ones in the place of the others.
    """
    return pltpu.bitcast(pltpu.bitcast(p, jnp.uint32) & visible_bits, p.dtype)


def spread_sums(p: jax.Array) -> jax.Array:
    """The sums of rows as the means over 128 lanes, f32[rows, 128].

    To add lanes takes the slow way through the cross-lane units: state is kept so, and
    they are added once, by ``whole_sums``. The largest lane of a row is at least its
    sum.
    """
    if p.shape[1] % LANES:
        return across(jnp.sum(p, axis=1, keepdims=True), LANES)
    first, *others = (p[:, i : i + LANES] for i in range(0, p.shape[1], LANES))
    return LANES * sum(others, start=first)


def whole_sums(state: SoftmaxState) -> SoftmaxState:
    """The state with all lanes of ``l`` equal, for sums that are spread or not."""
    l = jnp.sum(state.l, axis=1, keepdims=True) * (1.0 / LANES)  # noqa: E741
    return state._replace(l=across(l, LANES))


def add_block(
    state: SoftmaxState,  # with the maximum of all blocks up to this one
    correction: jax.Array,  # f32[rows, 128]
    row_sum: jax.Array,  # f32[rows, 1], of the probabilities
    weighted_values: jax.Array,  # f32[rows, lanes]
) -> SoftmaxState:
    """The state with a block's sums added."""
    acc = state.acc * across(correction, state.acc.shape[1]) + weighted_values
    return SoftmaxState(state.m, state.l * correction + row_sum, acc)


def with_ones(v: jax.Array) -> jax.Array:  # [block_kv, 128] to [block_kv, 256]
    """Appends columns of ones, whose products are the sums of the probabilities.

    A matrix unit of 256 columns has them free beside 128 lanes of values, and the
    vector units are spared the sum. The sum is then that of the rounded
    probabilities, which are also the weights.
    """
    return jnp.concatenate([v, jnp.ones_like(v)], axis=1)


def log_sums(state: SoftmaxState, numerics: Numerics) -> jax.Array:
    """The natural logarithm of each row's sum, f32[rows, 128], all lanes equal.

    Minus infinity for rows that saw no key, infinity for those whose sink is infinite.
    """
    m = state.m
    if numerics.exponent_multiplier != 1.0:
        m = m * numerics.exponent_multiplier
    lse = m * (1.0 / LOG2_E) + jnp.log(state.l)
    # Far from any score, but for what rounding does to the two limits.
    is_empty = (state.l == 0.0) | (m < NO_KEY_MAX / 2)
    lse = jnp.where(m > SINK_MAX / 2, jnp.inf, lse)
    return jnp.where(is_empty, -jnp.inf, lse)


def normalise(state: SoftmaxState, scale: float) -> jax.Array:
    """The attention output, f32[rows, lanes]; zeros for rows that saw no key.

    ``scale`` is a factor of the values.
    """
    # One operation instead of two: acc is zero where l is.
    inverse = 1.0 / jnp.maximum(state.l, MIN_SUM)
    if scale != 1.0:
        inverse = inverse * scale
    return state.acc * across(inverse, state.acc.shape[1])


def across(column: jax.Array, width: int) -> jax.Array:
    """[rows, 128] with equal lanes, widened or narrowed to [rows, width]."""
    lanes = column.shape[1]
    if width == lanes:
        return column
    if width % lanes == 0:
        return jnp.concatenate([column] * (width // lanes), axis=1)
    return jnp.broadcast_to(column[:, :1], (column.shape[0], width))

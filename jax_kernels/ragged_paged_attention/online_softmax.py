"""Softmax over keys that arrive block by block, on plain arrays.

Scores are in units of log2 (the scale holds log2(e)), so ``exp2`` is exp. For every
row the state holds the running maximum ``m``, the sum ``l`` of ``exp2(s - m)`` and
the weighted values ``acc``. Milakov and Gimelshein, arXiv 1805.02867.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_kernels.ragged_paged_attention.config import LOG2_E, AttentionSpec

# The maximum of a row that has seen no key. It is finite, so that a masked score
# of -inf gives exp2(-inf - m) = 0 and never (-inf) - (-inf).
NO_KEY_MAX = float(np.finfo(np.float32).min) / 2
MASKED_SCORE = float("-inf")


class SoftmaxState(NamedTuple):
    """Running state of some rows; f32 whatever the output is."""

    m: jax.Array  # f32[rows, 128], all lanes equal
    l: jax.Array  # noqa: E741  f32[rows, 128], all lanes equal
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
    q: jax.Array,  # [rows, lanes], already multiplied
    k: jax.Array,  # [block_kv, lanes]
    spec: AttentionSpec,
) -> jax.Array:  # f32[rows, block_kv], units of log2
    """Scores of one tile."""
    scores = dot_f32(q, k, rhs_contract=1)
    if spec.score_multiplier != 1.0:
        scores = scores * spec.score_multiplier
    if spec.soft_cap is not None:
        scores = jnp.tanh(scores) * (spec.soft_cap * LOG2_E)
    return scores


def probabilities(
    scores: jax.Array,  # f32[rows, block_kv]
    state: SoftmaxState,
) -> tuple[jax.Array, jax.Array, SoftmaxState]:
    """Unnormalised probabilities, the correction of ``acc``, and the new m and l.

    Returns:
      p f32[rows, block_kv]; correction f32[rows, 128]; the state with m and l
      updated and ``acc`` as it was.
    """
    m = jnp.maximum(state.m, jnp.max(scores, axis=1, keepdims=True))
    correction = jnp.exp2(state.m - m)
    p = jnp.exp2(scores - _across(m, scores.shape[1]))
    total = state.l * correction + jnp.sum(p, axis=1, keepdims=True)
    return p, correction, SoftmaxState(m, total, state.acc)


def accumulate(
    p: jax.Array,  # [rows, block_kv], in the dtype of the multiplication
    v: jax.Array,  # [block_kv, lanes]
    correction: jax.Array,  # f32[rows, 128]
    acc: jax.Array,  # f32[rows, lanes]
) -> jax.Array:
    """The weighted values, brought to the new maximum, plus this tile's."""
    return acc * _across(correction, acc.shape[1]) + dot_f32(p, v, rhs_contract=0)


def normalise(state: SoftmaxState, v_scale: float | None) -> jax.Array:
    """The attention output, f32[rows, lanes]; zeros for rows that saw no key."""
    inverse = jnp.where(state.l > 0.0, 1.0 / state.l, 0.0)
    if v_scale is not None:
        inverse = inverse * v_scale
    # Rows without a key hold acc = 0 unless a sink alone made l positive.
    return state.acc * _across(inverse, state.acc.shape[1])


def _across(column: jax.Array, width: int) -> jax.Array:
    """[rows, 128] with equal lanes, widened or narrowed to [rows, width]."""
    lanes = column.shape[1]
    if width == lanes:
        return column
    if width % lanes == 0:
        return jnp.concatenate([column] * (width // lanes), axis=1)
    return jnp.broadcast_to(column[:, :1], (column.shape[0], width))

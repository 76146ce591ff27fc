"""Joins attention over parts of the keys into attention over all of them."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from jax_kernels.contract.options import INPUT_DTYPES


def merge_attention(
    outs: Iterable[jax.Array], lses: Iterable[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The attention over all keys, and its logarithms; see torch_rpa.merge_attention.

    Args:
      outs: Outputs [..., D] of ``ragged_paged_attention`` over parts of the keys, all
        bfloat16 or all float32.
      lses: f32[...], what ``return_lse`` gives for each.

    Returns:
      [..., D] in the dtype of the parts, and f32[...].

    Raises:
      ValueError: There is no part, or shapes or dtypes do not fit.
      NotImplementedError: Parts of another dtype.
    """
    outs, lses = tuple(outs), tuple(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(
            "outs and lses must have as many parts, at least one, got "
            f"{len(outs)} and {len(lses)}"
        )
    first = jax.eval_shape(lambda x: x, outs[0])
    if not first.shape:
        raise ValueError("outs[0] must have shape [..., D], got []")
    if first.dtype.name not in INPUT_DTYPES:
        raise NotImplementedError(
            f"outs of {first.dtype} are not supported: cast them to bfloat16 or float32"
        )
    sums = jax.ShapeDtypeStruct(first.shape[:-1], jnp.float32)
    for name, parts, expected in (("outs", outs, first), ("lses", lses, sums)):
        for index, part in enumerate(parts):
            if part.shape != expected.shape or part.dtype != expected.dtype:
                raise ValueError(
                    f"{name}[{index}] must be {expected.dtype} {list(expected.shape)}, "
                    f"got {part.dtype} {list(part.shape)}"
                )
    parts = jnp.stack(lses)
    # The result is the same whatever is taken off.
    peak = jax.lax.stop_gradient(parts.max(axis=0, keepdims=True))
    peak = jnp.where(jnp.isneginf(peak), 0.0, peak)  # (-inf) - (-inf) is NaN
    # So is inf - inf.
    weights = jnp.exp(jnp.where(jnp.isposinf(parts), 0.0, parts - peak))
    total = weights.sum(axis=0, keepdims=True)
    shares = weights / jnp.where(total == 0.0, 1.0, total)
    merged = (shares[..., None] * jnp.stack(outs).astype(jnp.float32)).sum(axis=0)
    return merged.astype(first.dtype), (peak + jnp.log(total))[0]

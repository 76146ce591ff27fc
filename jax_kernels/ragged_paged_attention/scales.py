"""Scales that are arrays: from the caller's shapes to factors of key heads."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_kernels.contract import Arguments
from jax_kernels.contract.arguments import OPTIONS_AS_ARRAYS
from jax_kernels.ragged_paged_attention.numerics import HeadFactor

# Of a float32: bits of its fraction, and the leading one before them.
_FRACTION_BITS = 23
_LEADING_ONE = 1 << _FRACTION_BITS
# Exponent field of the inverse of a number whose own is e: this minus e. A power of two
# has one more.
_EXPONENTS = 253


def of_heads(arguments: Arguments, num_kv_heads: int) -> dict[str, jax.Array]:
    """f32[Hkv] of each scale that is an array, by the name of its option."""
    return {
        option: jnp.broadcast_to(getattr(arguments, name), (num_kv_heads,))
        for name, option in OPTIONS_AS_ARRAYS.items()
        if getattr(arguments, name) is not None
    }


def head_factors(
    factors: Sequence[HeadFactor], scales: Mapping[str, jax.Array]
) -> jax.Array | None:
    """f32[factors * Hkv], the values of factors; None if there are none.

    Args:
      factors: What they are.
      scales: f32[Hkv] of each scale, see ``of_heads``.
    """
    if not factors:
        return None
    return jnp.concatenate([_head_factor(factor, scales) for factor in factors])


def _head_factor(factor: HeadFactor, scales: Mapping[str, jax.Array]) -> jax.Array:
    if factor.is_inverse:
        (scale,) = factor.scales
        return reciprocal(scales[scale])
    values = (scales[scale] for scale in factor.scales)
    return functools.reduce(jnp.multiply, values) * np.float32(factor.constant)


def reciprocal(x: jax.Array) -> jax.Array:
    """f32: inverses of positive normal numbers, rounded to nearest on every device.

    Devices differ in how they divide, so fractions go through long division. Only the
    inverse of a power of two has no rest, and none is in the middle of two numbers.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    exponent = bits >> _FRACTION_BITS
    divisor = (bits & np.uint32(_LEADING_ONE - 1)) | np.uint32(_LEADING_ONE)
    quotient = jnp.zeros_like(bits)
    rest = jnp.full_like(bits, _LEADING_ONE)
    for _ in range(_FRACTION_BITS + 2):
        fits = rest >= divisor
        quotient = (quotient << 1) | fits.astype(jnp.uint32)
        rest = jnp.where(fits, rest - divisor, rest) << 1
    quotient += (rest >= divisor).astype(jnp.uint32)
    # A quotient of 2**24 carries into the exponent.
    bits = ((_EXPONENTS - exponent) << _FRACTION_BITS) + (quotient - _LEADING_ONE)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)

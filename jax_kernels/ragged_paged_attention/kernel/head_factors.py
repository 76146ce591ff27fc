"""Factors with a value for each key head, in SMEM: scales that are arrays."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_kernels.ragged_paged_attention.kernel.ints import Int
from jax_kernels.ragged_paged_attention.numerics import HeadFactor


class HeadFactors:
    """The numbers of ``Numerics.head_factors``.

    Args:
      ref: f32[factors * Hkv] in SMEM, or None if there are none.
      factors: What they are.
      num_kv_heads: Hkv.
    """

    def __init__(self, ref: Any, factors: Sequence[HeadFactor], num_kv_heads: int):
        self._ref = ref
        self._places = {
            factor.name: index * num_kv_heads for index, factor in enumerate(factors)
        }

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def load(self, name: str, head: Int) -> jax.Array:
        """f32[]: a factor that is there, of one key head."""
        return self._ref[self._places[name] + head]

    def multiply(self, name: str, x: jax.Array, head: Int) -> jax.Array:
        """f32: an array of one key head by its factor; as it is if there is none."""
        if name not in self:
            return x
        return x.astype(jnp.float32) * self.load(name, head)

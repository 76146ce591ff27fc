"""Buffers of logarithms of sums: those of a token's query heads lie side by side.

The softmax has a head in rows, all lanes equal. Here head ``128 * row + lane`` of a
token is in one lane of one word row.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.config import KernelConfig
from jax_kernels.ragged_paged_attention.kernel import tile_io
from jax_kernels.ragged_paged_attention.kernel.schedule import Int
from jax_kernels.ragged_paged_attention.layout import LANES


class LseRows:
    """Some tokens of a buffer.

    Args:
      ref: f32[tokens, word rows, 1, 128] in VMEM.
      config: Gives the layout.
    """

    def __init__(self, ref, config: KernelConfig):
        self._words = tile_io.TokenWords(ref, config.lse_layout, config.interpret)
        self._num_rows = config.lse_layout.num_rows

    def store_heads(
        self, heads: dict[int, jax.Array], first_head: Int, first_token: Int
    ) -> None:
        """Stores some heads of consecutive tokens, and leaves the others alone.

        Args:
          heads: f32[tokens, 128], all lanes equal, by number from ``first_head`` on.
          first_head: May be traced.
          first_token: Of the tokens.
        """
        num_tokens = next(iter(heads.values())).shape[0]
        for index in range(self._num_rows):
            words = self._words.load(index, first_token, num_tokens)
            row = pltpu.bitcast(words, jnp.float32)
            for number, lse in heads.items():
                row = jnp.where(self._head(index) == first_head + number, lse, row)
            self._words.store(pltpu.bitcast(row, jnp.uint32), index, first_token)

    def store_column(
        self, lse: jax.Array, num_heads: int, first_head: Int, token: Int
    ) -> None:
        """Stores some heads of one token, which are in rows.

        Args:
          lse: f32[rows, 128], a head in each row, all lanes equal. Rows past
            ``num_heads`` are anything.
          num_heads: Heads from ``first_head`` on.
          first_head: May be traced.
          token: The token.
        """
        number = lax.broadcasted_iota(jnp.int32, lse.shape, 0)
        for index in range(self._num_rows):
            place = self._head(index) - first_head
            is_own = (place == number) & (number < num_heads)
            row = jnp.sum(jnp.where(is_own, lse, 0.0), axis=0, keepdims=True)
            words = self._words.load(index, token, 1)
            is_any = (place >= 0) & (place < num_heads)
            row = jnp.where(is_any, row, pltpu.bitcast(words, jnp.float32))
            self._words.store(pltpu.bitcast(row, jnp.uint32), index, token)

    def _head(self, index: int) -> jax.Array:
        """i32[1, 128]: the query head of each lane of a word row."""
        return index * LANES + lax.broadcasted_iota(jnp.int32, (1, LANES), 1)

"""Keys and values of one cell of decode, as the matrix units take them.

*Dead tokens*, which the query does not see, may hold anything, and a zero probability
does not cancel NaN. So they are zeros in what the matrix units take. Whole chunks of
them cost nothing: a load, or a push into a matrix unit, has a mask for a register. The
chunk in which the live tokens end is cleared in the buffer until its products are
done. With a window there is another end, and cells are short: their words are masked.
So are they where several new tokens are merged before the products.

*Paired rows*: up to a head dimension of 64 a row of the cache holds a key and its
value, so that half of all that a matrix unit took would meet zeros. Rows of the first
half of a cell meet those of the second half instead, and the queries are laid out
twice::

    row of token a         | key a   | value a |
    row of token b         | key b   | value b |

    scores                 | key a   | key b   |     of queries  | q | 0 |  with a
                                                     and         | 0 | q |  with b
    weighted values        | value b | value a |     by p of a and p of b
    of those               | by b    | by a    |     are kept, and added at the end
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.config import KernelConfig
from jax_kernels.ragged_paged_attention.kernel import (
    masking,
    online_softmax,
    tile_io,
)
from jax_kernels.ragged_paged_attention.kernel.block_loads import (
    load_words,
    to_tokens,
    value_words_mask,
    words_of_ones,
)
from jax_kernels.ragged_paged_attention.kernel.schedule import Int, log2
from jax_kernels.ragged_paged_attention.layout import LANES


@dataclasses.dataclass(frozen=True)
class CellBlock:
    """The keys and values of a cell.

    Attributes:
      config: Gives dtypes and geometry.
      kv: VMEM of the step, [heads_per_page, rows, packing, lanes].
      first_row: Of the cell among the rows of the step.
      num_rows: Rows of the cell.
      wraps: Whether tokens behind the last one of ``size`` take the places of those
        before the first that is visible.
      size: Tokens of the cell to compute.
      visible_begin: First token that the query sees; may be out of the block.
      visible_end: The one after the last, likewise.
      masks_words: Whether the words of dead tokens are masked one by one.
      is_alone: Whether no other cell adds to its weighted values.
      swapped: Rows with swapped lanes, by run, from ``products`` to
        ``weighted_values``: to move lanes twice takes longer than to keep the result.
      saved: What ``restore`` puts back: head of the page, row and words of chunks.
    """

    config: KernelConfig
    kv: Any
    first_row: int
    num_rows: int
    wraps: bool
    size: int
    visible_begin: Int
    visible_end: Int
    masks_words: bool
    is_alone: bool
    swapped: list[jax.Array] = dataclasses.field(default_factory=list)
    saved: list[tuple[Int, Int, jax.Array]] = dataclasses.field(default_factory=list)

    @property
    def is_paired(self) -> bool:
        """Whether rows are paired: the pairs fill a matrix unit."""
        columns = self.config.chip.matrix_columns
        return self.config.cache.is_fused_kv and self._pairs >= columns

    def merge(
        self,
        new: Sequence[tuple[Int, int, jax.Array]],
        chunk: Int,
        is_new: jax.Array,
    ) -> None:
        """Merges new tokens into a chunk of some heads, and clears dead values in it.

        Args:
          new: Key head, part, and u32[rows_per_chunk, lanes], packed rows. The part is
            1 for values that have rows of their own, else 0.
          chunk: Number of the chunk in the cell.
          is_new: u32[rows_per_chunk, 1], the bits to take.
        """
        row = self._row_of_chunk(chunk)
        merged = []
        # All loads first: none of them can pass a store to a place that is not known.
        for head, part, words in new:
            row_head = self._row_head(head, part)
            old = self._load_chunk(row_head, row)
            merged.append((row_head, part, (words & is_new) | (old & ~is_new)))
        firsts = [self._wrapped(row_head, words) for row_head, _, words in merged]
        for (row_head, part, words), first in zip(merged, firsts, strict=True):
            # First, since it may be the same chunk, into which no token is taken then.
            if first is not None:
                self._rows(row_head).store(first, self.first_row)
            if part == self._value_part and not self.masks_words:
                self._store_live(row_head, chunk, words)
            else:
                self._rows(row_head).store(words, row)

    def clear_end(self, head: Int) -> None:
        """Clears dead values in the last chunk of a key head with live ones.

        It also takes tokens to the places of dead ones, if there are some to take.
        Where new tokens are merged, this is done with them.
        """
        config = self.config
        if config.spec.update_kv_cache or self.masks_words:
            return
        last_chunk = self.num_rows // config.rows_per_chunk - 1
        chunk = (self.visible_end - 1) >> log2(config.tokens_per_chunk)
        chunk = jnp.clip(chunk, 0, last_chunk)
        row_head = self._row_head(head, self._value_part)
        row = self._row_of_chunk(chunk)
        self._store_live(row_head, chunk, self._load_chunk(row_head, row))
        if self.wraps:
            row = self._row_of_chunk(self.size // config.tokens_per_chunk)
            for part in range(self._value_part + 1):
                row_head = self._row_head(head, part)
                first = self._wrapped(row_head, self._load_chunk(row_head, row))
                if first is not None:
                    self._rows(row_head).store(first, self.first_row)

    def restore(self) -> None:
        """Puts back what was cleared: rows are written to the cache as they were."""
        for row_head, row, words in reversed(self.saved):
            self._rows(row_head).store(words, row)
        self.saved.clear()

    @property
    def heads_per_product(self) -> int:
        """Key heads whose keys, or values, a matrix unit takes at once.

        A product with fewer tokens than it has columns takes as long as one with more.
        """
        if self.size % LANES:
            return 1
        return max(self.config.chip.matrix_columns // self.size, 1)

    def products(self, x: jax.Array, heads: Sequence[Int]) -> list[jax.Array]:
        """f32[rows, size], queries f32[rows, lanes] with the keys of each key head.

        There are up to ``heads_per_product``.
        """
        config = self.config
        dtype = config.numerics.multiply_dtype
        if not self.is_paired:
            words = _concatenate([self._load(head, 0, self.size) for head in heads])
            k = to_tokens(words, dtype, config, few_queries=True)
            by_head = online_softmax.products(tile_io.prepare_queries(x, config), k)
            return jnp.split(by_head, len(heads), axis=1)
        (head,) = heads
        num_rows = x.shape[0]
        q = tile_io.prepare_queries(jnp.concatenate([x, self._swap_halves(x)]), config)
        by_run = []
        for start, size in self._runs():
            first = self._load_live(head, start, size)
            second = self._load_live(head, self._pairs + start, size)
            second = self._swap_halves(second)
            self.swapped.append(second)
            words = jnp.where(self._is_low_lane(), first, second)
            # The keys of two tokens meet the same query.
            words = self._without_dead(words, start, is_first_low=True)
            k = to_tokens(words, dtype, config, few_queries=True)
            by_run.append(online_softmax.products(q, k))
        by_pair = jnp.concatenate(by_run, axis=1)
        return [jnp.concatenate([by_pair[:num_rows], by_pair[num_rows:]], axis=1)]

    def weighted_values(self, p: jax.Array, heads: Sequence[Int]) -> jax.Array:
        """f32[rows, lanes], values of key heads by probabilities.

        The probabilities are f32[rows, size] for each head, side by side. A row that is
        not of a head has zeros for it.

        In a fused row both halves of the lanes have a part of each sum, which
        ``added_halves`` adds. Called for the same heads as ``products``, in the same
        order.
        """
        config = self.config
        dtype = config.numerics.value_dtype
        if not self.is_paired:
            words = []
            for head in heads:
                row_head = self._row_head(head, self._value_part)
                live = self._load_live(row_head, 0, self.size)
                words.append(self._without_dead(live))
            words = _concatenate(words)
            if self.gives_sums:
                ones = words_of_ones(dtype, config)
                words = jnp.where(self._is_low_lane(), ones, words)
            v = to_tokens(words, dtype, config, few_queries=True)
            weighted = online_softmax.dot_f32(p.astype(dtype), v, rhs_contract=0)
            if config.cache.is_fused_kv and not self.gives_sums:
                # Below are sums of keys.
                weighted = jnp.where(self._is_low_lane(), 0.0, weighted)
            return weighted
        (head,) = heads
        num_rows, runs = p.shape[0], []
        for start, size in self._runs():
            first, second = self._load_live(head, start, size), self.swapped.pop(0)
            words = jnp.where(self._is_low_lane(), second, first)
            runs.append(self._without_dead(words, start, is_first_low=False))
        v = to_tokens(jnp.concatenate(runs), dtype, config, few_queries=True)
        p = jnp.concatenate([p[:, : self._pairs], p[:, self._pairs :]])
        by_half = online_softmax.dot_f32(p.astype(dtype), v, rhs_contract=0)
        return jnp.where(self._is_low_lane(), by_half[num_rows:], by_half[:num_rows])

    def added_halves(self, weighted: jax.Array) -> jax.Array:
        """The whole sums of ``weighted_values``, from lane 0 on."""
        if not self.config.cache.is_fused_kv:
            return weighted
        swapped = self._swap_halves(weighted)
        return swapped if self.gives_sums else weighted + swapped

    @property
    def gives_sums(self) -> bool:
        """Whether ``weighted_values`` has the sums of probabilities in lanes of keys.

        Ones in the place of keys save the vector units the sum.
        """
        return self.config.cache.is_fused_kv and self.is_alone and not self.is_paired

    def _wrapped(self, row_head: Int, words: jax.Array) -> jax.Array | None:
        """The first chunk with the tokens behind the block in its first row.

        A window that begins within a packed row ends within another, at the same place
        of it. So its last tokens fill the first row.

        Args:
          row_head: Which of the heads of a page.
          words: u32[rows_per_chunk, lanes]. If there is a token behind the block, they
            are those of the chunk behind it.

        Returns:
          u32[rows_per_chunk, lanes], or None if no cell has tokens there.
        """
        if not self.wraps:
            return None
        first, mask = self._load_chunk(row_head, self.first_row), self._wrapped_mask
        return (words & mask) | (first & ~mask)

    @functools.cached_property
    def _wrapped_mask(self) -> jax.Array:
        """u32[rows_per_chunk, 1], the bits of tokens behind the block."""
        config = self.config
        return masking.leading_word_mask(
            self.visible_end - self.size, config.rows_per_chunk, config.cache.packing
        )

    def _store_live(self, row_head: Int, chunk: Int, words: jax.Array) -> None:
        """Stores a chunk with zeros for what is dead."""
        config, row = self.config, self._row_of_chunk(chunk)
        is_live = masking.leading_word_mask(
            self.visible_end - chunk * config.tokens_per_chunk,
            config.rows_per_chunk,
            config.cache.packing,
        )
        self._rows(row_head).store(words & is_live, row)
        if config.spec.update_kv_cache:
            self.saved.append((row_head, row, words))

    def _without_dead(
        self, words: jax.Array, start: int = 0, *, is_first_low: bool | None = None
    ) -> jax.Array:
        """Words with zeros in chunks without a live token; all if words are masked.

        Args:
          words: u32[rows, lanes], of the cell or of two halves of it.
          start: First token, in the cell or in each half.
          is_first_low: Whether lanes below those of values hold the first half, and
            the others the second half, or the other way round; None without halves.
        """
        if self.masks_words:
            return words
        config = self.config
        chunks = words.reshape(-1, config.rows_per_chunk, words.shape[1])
        end = self.visible_end - start
        if is_first_low is not None:
            is_first = self._is_low_lane()[None] == is_first_low
            end -= jnp.where(is_first, 0, self._pairs)
        num_live = (end + (config.tokens_per_chunk - 1)) >> log2(
            config.tokens_per_chunk
        )
        index = lax.broadcasted_iota(jnp.int32, chunks.shape, 0)
        return jnp.where(index < num_live, chunks, jnp.uint32(0)).reshape(words.shape)

    @functools.cached_property
    def _words_mask(self) -> jax.Array:
        """u32[size // packing, 1], see ``value_words_mask``."""
        return value_words_mask(
            self.visible_begin, self.visible_end, self.size, self.config
        )

    @property
    def _pairs(self) -> int:
        """Pairs of tokens of a cell: token n, and token n of the second half."""
        return self.size // 2

    def _runs(self) -> list[tuple[int, int]]:
        """Pairs that are loaded together, as many as a matrix unit takes at once.

        The compiler moves lanes in the order of the source. In one run, it would move
        all of a cell before the first product.
        """
        columns = self.config.chip.matrix_columns
        return [
            (start, min(columns, self._pairs - start))
            for start in range(0, self._pairs, columns)
        ]

    def _is_low_lane(self) -> jax.Array:
        """bool[1, lanes]: those of keys in a fused row."""
        lane = lax.broadcasted_iota(jnp.int32, (1, self.config.lanes), 1)
        return lane < self.config.cache.value_lane

    def _swap_halves(self, x: jax.Array) -> jax.Array:
        """Moves the lanes of keys to those of values, and back."""
        return pltpu.roll(x, self.config.cache.value_lane, 1)

    @property
    def _value_part(self) -> int:
        return 0 if self.config.cache.is_fused_kv else 1

    def _row_head(self, head: Int, part: int) -> Int:
        """Which of the heads of a page: keys come before values."""
        return part * self.config.num_kv_heads + head

    def _row_of_chunk(self, chunk: Int) -> Int:
        return self.first_row + chunk * self.config.rows_per_chunk

    def _load_chunk(self, row_head: Int, row: Int) -> jax.Array:
        """u32[rows_per_chunk, lanes]"""
        return self._rows(row_head).load(row, self.config.rows_per_chunk)

    def _load(self, head: Int, first_token: int, size: int) -> jax.Array:
        """u32[size // packing, lanes]"""
        first_row = first_token // self.config.cache.packing
        return load_words(self.kv, head, size, self.config, self.first_row + first_row)

    def _load_live(self, head: Int, first_token: int, size: int) -> jax.Array:
        """``_load``, without what is dead if words are masked."""
        words = self._load(head, first_token, size)
        if not self.masks_words:
            return words
        first_row = first_token // self.config.cache.packing
        return words & self._words_mask[first_row : first_row + words.shape[0]]

    def _rows(self, head: Int) -> tile_io.WordRows:
        return tile_io.WordRows(self.kv.at[head], self.config.interpret)


def _concatenate(words: Sequence[jax.Array]) -> jax.Array:
    return words[0] if len(words) == 1 else jnp.concatenate(words)

"""How queries, new keys and values, and outputs lie in memory, as the kernel sees them.

A *word row* is up to 128 words of 32 bits. Two bf16 heads of a token share words, or
two tokens of a key head whose number is odd. XLA keeps an array in pieces of up to
eight rows and 128 lanes, and the views that are made here have the order of its bytes,
so that they cost nothing. In bf16, with eight heads of 256 lanes::

    [T, 8, 256]      lanes 0 .. 127                   lanes 128 .. 255
    a token          heads 0|1, 2|3, 4|5, 6|7         heads 0|1, 2|3, 4|5, 6|7
    word rows        0    1    2    3                 4    5    6    7
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_kernels.ragged_paged_attention.layout import LANES, dtype_packing

# Heads or tokens in a piece of an array, if there are as many.
PIECE_ROWS = 8


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What both layouts have.

    Attributes:
      num_heads: H.
      lanes: Length of a head, as it is in the array: up to 128, or a multiple.
      dtype: Of the array.
    """

    num_heads: int
    lanes: int
    dtype: np.dtype

    @property
    def packing(self) -> int:
        """Heads, or tokens, that share words."""
        return dtype_packing(self.dtype)

    @property
    def row_lanes(self) -> int:
        """Words of a word row."""
        return min(self.lanes, LANES)

    @property
    def columns(self) -> int:
        """Word rows that a head, or those that share its words, are spread over."""
        return self.lanes // self.row_lanes


@dataclasses.dataclass(frozen=True)
class TokenRows(_Rows):
    """An array by token; heads share words, so their number is a multiple of packing.

    A *word* here is what shares 32 bits: word w has the heads from w * packing on.
    """

    @property
    def num_rows(self) -> int:
        """Word rows of a token."""
        return self.num_heads // self.packing * self.columns

    @property
    def buffer_rows(self) -> int:
        """The same in a buffer in VMEM.

        Made odd: loads with an even stride would hit the same memory bank again and
        again.
        """
        return self.num_rows | 1

    @property
    def words_per_piece(self) -> int:
        """Consecutive words whose word rows follow each other; a power of two."""
        heads = PIECE_ROWS
        if self.num_heads in (1, 2, 4):
            heads = self.num_heads
        elif self.num_heads % PIECE_ROWS:
            # XLA pads the last piece, and has to copy the array whatever the order.
            heads = self.packing
        return heads // self.packing

    def row(self, word, column: int):
        """Number of a word row within its token.

        Args:
          word: Number of the word, plain or traced.
          column: Which 128 lanes.
        """
        if self.columns == 1:
            return word
        size = self.words_per_piece
        piece = word >> (size.bit_length() - 1)
        return (piece * self.columns + column) * size + (word & (size - 1))

    def shape(self, num_tokens: int) -> tuple[int, int, int, int]:
        """Shape of the view: [T, word rows, packing, row_lanes]."""
        return num_tokens, self.num_rows, self.packing, self.row_lanes

    def view(self, x: jax.Array) -> jax.Array:
        """[T, H, lanes] in the shape of the view."""
        num_tokens, heads = x.shape[0], self.words_per_piece * self.packing
        if self.columns > 1:
            pieces = num_tokens, -1, heads, self.columns, self.row_lanes
            x = x.reshape(pieces).swapaxes(2, 3)
        return x.reshape(self.shape(num_tokens))

    def heads(self, view: jax.Array) -> jax.Array:
        """Inverse of ``view``."""
        num_tokens, heads = view.shape[0], self.words_per_piece * self.packing
        if self.columns > 1:
            pieces = num_tokens, -1, self.columns, heads, self.row_lanes
            view = view.reshape(pieces).swapaxes(2, 3)
        return view.reshape(num_tokens, self.num_heads, self.lanes)


@dataclasses.dataclass(frozen=True)
class HeadRows(_Rows):
    """An array by head; consecutive tokens share words.

    So XLA keeps an array with an odd number of heads. A *piece* is some consecutive
    tokens with one column after the other; with a single column it is a word.
    """

    @property
    def words_per_piece(self) -> int:
        """Words of a piece in each column."""
        return 1 if self.columns == 1 else PIECE_ROWS // self.packing

    @property
    def tokens_per_piece(self) -> int:
        """A power of two."""
        return self.words_per_piece * self.packing

    def view(self, x: jax.Array) -> jax.Array:
        """[T, H, lanes] as [H, pieces, columns, words_per_piece, packing, row_lanes].

        The same bytes where T is a multiple of eight.
        """
        x = jnp.swapaxes(x, 0, 1)
        size = self.tokens_per_piece
        missing = -x.shape[1] % size
        if missing:
            x = jnp.pad(x, [(0, 0), (0, missing), (0, 0)])
        x = x.reshape(self.num_heads, -1, size, self.columns, self.row_lanes)
        x = x.swapaxes(2, 3)
        words = self.words_per_piece, self.packing
        return x.reshape(*x.shape[:3], *words, self.row_lanes)

    def buffer_shape(self, num_tokens: int) -> tuple[int, ...]:
        """Shape of a buffer in VMEM that has one column after the other.

        [H, columns, pieces, words_per_piece, packing, row_lanes], with room for
        ``num_tokens`` from any token of a piece on.
        """
        size = self.tokens_per_piece
        pieces = (num_tokens + size - 2) // size + 1
        words = self.words_per_piece, self.packing
        return self.num_heads, self.columns, pieces, *words, self.row_lanes

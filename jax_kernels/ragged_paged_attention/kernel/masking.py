"""Which query sees which key. Positions are int32: int16 wraps past 32767 tokens."""

import jax
import jax.numpy as jnp

from jax_kernels.ragged_paged_attention.config import AttentionSpec
from jax_kernels.ragged_paged_attention.kernel import ints
from jax_kernels.ragged_paged_attention.kernel.ints import Bool, Int, log2
from jax_kernels.ragged_paged_attention.kernel.schedule import Cell


def attention_mask(
    query_positions: jax.Array,  # i32[rows, 1]
    key_positions: jax.Array,  # i32[1, block_kv]
    visible_end: Int,
    new_start: Int,
    spec: AttentionSpec,
    query_ends: jax.Array | None = None,  # i32[rows, 1]
) -> jax.Array:  # bool[rows, block_kv]
    """True where a query sees a key.

    A key is visible when it is before the end, not after the query (causal), among the
    last ``sliding_window`` positions up to the query, and, if only new tokens are,
    from ``new_start`` on. If only those before are, the end is there.

    ``query_ends`` are as ``AttentionSpec.seen_end`` gives them. They are needed where
    a query sees keys after it.
    """
    if query_ends is not None and spec.attend != "cache":
        mask = key_positions < jnp.minimum(query_ends, visible_end)
    elif spec.causal and spec.attend != "cache":
        # Queries of live rows are below the end, so this bounds the keys too.
        mask = key_positions <= query_positions
    else:
        mask = key_positions < visible_end
    if spec.sliding_window is not None:
        mask &= key_positions > query_positions - spec.sliding_window
    if spec.attend == "new":
        mask &= key_positions >= new_start
    return mask


def decode_mask(
    visible_begin: Int | None, visible_end: Int, size: int
) -> jax.Array:  # bool[1, size]
    """True at the tokens of a block that its only query sees.

    Args:
      visible_begin: First token of the window, counted from the start of the block, or
        None: there is none before it.
      visible_end: The one after the last live token, likewise.
      size: Tokens of the block.
    """
    key = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
    mask = key < visible_end
    if visible_begin is not None:
        mask &= key >= visible_begin
    return mask


def needs_mask(cell: Cell, block_kv: int, spec: AttentionSpec) -> Bool:
    """Whether some query of the cell does not see some position of the block.

    False for the interior blocks, which then run without any mask arithmetic.
    """
    seen_by_first = (
        ints.minimum(cell.visible_end, spec.seen_end(cell.query_position + 1))
        if spec.causal
        else cell.visible_end
    )
    partial = cell.block_start + block_kv > seen_by_first
    if spec.sliding_window is not None:
        last_query = cell.query_position + cell.num_queries - 1
        partial |= cell.block_start <= last_query - spec.sliding_window
    if spec.attend == "new":
        partial |= cell.block_start < cell.new_start
    return partial


def token_word_mask(
    token: Int, num_rows: int, packing: int
) -> jax.Array:  # u32[num_rows, 1]
    """All-ones bits for one token of packed rows; none if it is not in the rows.

    It is arithmetic on vectors, for code in which the scalar unit has more to do.

    Args:
      token: Its number, counted from the first token of the first row.
      num_rows: Rows of the mask.
      packing: Tokens per row, of which the first is in the lowest bits.
    """
    place = _place_in_row(token, num_rows, packing)
    bits = (jnp.uint32(1) << jnp.uint32(32 // packing - 1) << 1) - 1
    shift = (place << log2(32 // packing)).astype(jnp.uint32)
    is_in_row = (place & -packing) == 0
    return jnp.where(is_in_row, bits << shift, jnp.uint32(0))


def leading_word_mask(
    num_tokens: Int, num_rows: int, packing: int
) -> jax.Array:  # u32[num_rows, 1]
    """All-ones bits for the first tokens of packed rows, as ``token_word_mask``."""
    place = _place_in_row(num_tokens, num_rows, packing)
    shift = (place << log2(32 // packing)).astype(jnp.uint32)
    partial = (jnp.uint32(1) << shift) - jnp.uint32(1)
    partial = jnp.where(place > 0, partial, jnp.uint32(0))
    return jnp.where(place >= packing, jnp.uint32(0xFFFFFFFF), partial)


def _place_in_row(token: Int, num_rows: int, packing: int) -> jax.Array:
    """i32[num_rows, 1]: a token, counted from the first one of each row."""
    row = jax.lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0)
    return token - (row << log2(packing))


def live_word_mask(
    first_position: Int,
    num_rows: int,
    packing: int,
    live_begin: Int | None,
    live_end: Int,
) -> jax.Array:  # u32[num_rows, 1]
    """All-ones bits for the tokens of packed rows that lie in a range of positions.

    Row r packs positions ``first_position + r * packing + (0 .. packing - 1)``, the
    earliest in the lowest bits. Example with packing 2: of the row that packs
    positions 6 and 7, live range 7 .. 9, the mask is 0xffff0000.

    Args:
      first_position: Of the first row; a multiple of ``packing``.
      num_rows: Rows of the mask.
      packing: Tokens per row.
      live_begin: First live position, or None when everything before the end is.
      live_end: Position after the last live one.
    """
    row = jax.lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0)

    def bits_before(end: Int) -> jax.Array:
        """Ones for the tokens of each row before position ``end``."""
        # Only one row is partly live, so its bits are scalar work.
        num_tokens = end - first_position
        whole_rows = num_tokens >> log2(packing)
        rest = (num_tokens & (packing - 1)) * (32 // packing)
        partial = (jnp.uint32(1) << rest.astype(jnp.uint32)) - jnp.uint32(1)
        tail = jnp.where(row == whole_rows, partial, jnp.uint32(0))
        return jnp.where(row < whole_rows, jnp.uint32(0xFFFFFFFF), tail)

    bits = bits_before(live_end)
    return bits if live_begin is None else bits & ~bits_before(live_begin)

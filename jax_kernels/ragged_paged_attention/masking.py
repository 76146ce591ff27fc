"""Which query sees which key. Positions are int32: int16 wraps past 32767 tokens."""

import jax
import jax.numpy as jnp

from jax_kernels.ragged_paged_attention.config import AttentionSpec
from jax_kernels.ragged_paged_attention.schedule import Cell, Int


def attention_mask(
    query_positions: jax.Array,  # i32[rows, 1]
    key_positions: jax.Array,  # i32[1, block_kv]
    visible_end: Int,
    spec: AttentionSpec,
) -> jax.Array:  # bool[rows, block_kv]
    """True where a query sees a key.

    A key is visible when it is live, not after the query (causal), and among the
    last ``sliding_window`` positions up to the query.
    """
    if spec.causal:
        # Queries of live rows are below the end, so this bounds the keys too.
        mask = key_positions <= query_positions
    else:
        mask = key_positions < visible_end
    if spec.sliding_window is not None:
        mask &= key_positions > query_positions - spec.sliding_window
    return mask


def needs_mask(cell: Cell, block_kv: int, spec: AttentionSpec) -> jax.Array:
    """Whether some query of the cell does not see some slot of the block.

    False for the interior blocks, which then run without any mask arithmetic.
    """
    seen_by_first = (
        jnp.minimum(cell.visible_end, cell.query_position + 1)
        if spec.causal
        else cell.visible_end
    )
    partial = cell.block_start + block_kv > seen_by_first
    if spec.sliding_window is not None:
        last_query = cell.query_position + cell.num_queries - 1
        partial |= cell.block_start <= last_query - spec.sliding_window
    return partial


def live_word_mask(
    first_position: Int,
    num_rows: int,
    packing: int,
    live_begin: Int,
    live_end: Int,
) -> jax.Array:  # u32[num_rows, 1]
    """All-ones bits for the tokens of packed rows that lie in a range of positions.

    Row r packs positions ``first_position + r * packing + (0 .. packing - 1)``, the
    earliest in the lowest bits. Example with packing 2: of the row that packs
    positions 6 and 7, live range 7 .. 9, the mask is 0xffff0000.
    """
    bits = 32 // packing
    row = jax.lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0)
    start = first_position + row * packing

    def low_bits(end: Int) -> jax.Array:
        """Ones for the tokens of each row before position ``end``."""
        count = jnp.clip(end - start, 0, packing)
        # A shift by the whole word is undefined, so a full row is chosen apart.
        partial = (jnp.uint32(1) << (count * bits).astype(jnp.uint32)) - jnp.uint32(1)
        return jnp.where(count == packing, jnp.uint32(0xFFFFFFFF), partial)

    return low_bits(live_end) & ~low_bits(live_begin)

"""Frozen values that fix a kernel at compile time, grouped by what they change.

* ``AttentionSpec`` changes answers.
* ``CacheLayout`` (layout.py) is fixed by the allocated cache.
* ``BlockSizes`` changes speed only.
* ``PhaseConfig`` is one of the specialised loops; ``KernelConfig`` is the whole.
"""

import dataclasses
import enum
import functools
import math
from typing import Any, TypeAlias

import numpy as np

from jax_kernels import chips
from jax_kernels.chips import Chip
from jax_kernels.contract import AttentionOptions
from jax_kernels.ragged_paged_attention import numerics
from jax_kernels.ragged_paged_attention.layout import (
    LANES,
    CacheLayout,
    align_to,
    dtype_packing,
)
from jax_kernels.ragged_paged_attention.numerics import Numerics
from jax_kernels.ragged_paged_attention.token_layout import HeadRows, TokenRows

# As kernel/ints.py has it.
Int: TypeAlias = Any

SUBLANES = 8
# Query rows whose scores are computed while those before go through the softmax.
# Fewer push keys and values into the matrix units too often for their use.
SOFTMAX_TILE_ROWS = 512
# Blocks that need a mask are computed this many tokens at a time: the columns of a
# matrix unit.
MASKED_TOKENS = 256
# Scores of a stretch of decode, which all have code of their own: 1024 registers.
MAX_STRETCH_SCORES = 1024 * 1024


class Phase(enum.Enum):
    """Which part of ``distribution`` a loop serves.

    ``DECODE_TILES`` is that of ``DECODE``, served by the loop of the others.
    """

    DECODE = "decode"
    DECODE_TILES = "decode_tiles"
    PREFILL = "prefill"
    MIXED = "mixed"


@dataclasses.dataclass(frozen=True)
class AttentionSpec(AttentionOptions):
    """What is computed: the options, and which arrays say more.

    Attributes:
      has_sinks: Whether ``sinks`` are given.
      array_options: Names of the options that are arrays; among the options they are
        None.
    """

    has_sinks: bool = False
    array_options: tuple[str, ...] = ()

    @property
    def hides_first_keys(self) -> bool:
        """Whether a query may see a key and none of those before it."""
        return self.sliding_window is not None or self.attend == "new"

    def seen_end(self, query_end: Int) -> Int:
        """The position after the last that a causal mask shows.

        There may be no token there yet. It works for scalars and vectors.

        Args:
          query_end: The position after the last query.
        """
        if self.causal_block is None:
            return query_end
        return (query_end + (self.causal_block - 1)) & -self.causal_block

    def first_that_sees(self, position: Int) -> Int:
        """The first query to which a causal mask shows the key at a position."""
        if self.causal_block is None:
            return position
        return position & -self.causal_block


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Sizes of tiles and blocks: they change speed and rounding, never the meaning.

    Attributes:
      decode_block_kv: Tokens of the cache fetched at once in decode; power of two.
      block_q: Query tokens per tile in prefill and mixed; power of two.
      block_kv: Tokens of the cache fetched at once there; power of two.
    """

    decode_block_kv: int
    block_q: int
    block_kv: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if not isinstance(size, int) or size < 1 or size.bit_count() != 1:
                raise ValueError(
                    f"block_sizes.{field.name}: expected a power of two, got {size!r}"
                )


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """Static shape of one specialised loop.

    Attributes:
      phase: The part of ``distribution``.
      block_q: Query tokens per tile, a power of two. In decode the queries of a
        sequence are one tile: ``decode_q_len``, rounded up.
      block_kv: Tokens of keys and values per cell.
      num_slots: Buffers in the ring of steps.
      lookahead: Steps whose DMAs run ahead of the one being computed. The
        ``num_slots - lookahead`` steps behind it may still be written back.
      cells_per_step: Cells that are fetched and computed together: more than 1 in
        decode only.
      num_kv_rings: Arrays that the slots of keys and values are spread over. With 2,
        in decode only, a step is never computed in the array that is being filled, so
        the compiler can start copies in the shadow of the vector work.
      chunk_kv: Tokens of a block that are computed at once where it needs a mask, in
        the loops but that of decode; of a smaller block, all of it.
    """

    phase: Phase
    block_q: int
    block_kv: int
    num_slots: int
    lookahead: int
    cells_per_step: int = 1
    num_kv_rings: int = 1
    chunk_kv: int = MASKED_TOKENS

    def __post_init__(self):
        if not 0 < self.lookahead < self.num_slots:
            raise ValueError(f"expected 0 < {self.lookahead=} < {self.num_slots=}")
        if self.num_kv_rings > 1 and self.num_slots != 2 * self.lookahead:
            raise ValueError(f"expected {self.num_slots=} == 2 * {self.lookahead=}")

    @property
    def is_decode(self) -> bool:
        return self.phase is Phase.DECODE

    @property
    def slots_per_kv_ring(self) -> int:
        return self.num_slots // self.num_kv_rings

    @property
    def num_io_slots(self) -> int:
        """Buffers in the rings of queries, of new tokens and of outputs.

        In decode every step has its own. The queries of a tile are prepared, and its
        new tokens are merged, before those of the next are fetched; its output has a
        tile's time to land.
        """
        return self.num_slots if self.is_decode else 1


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Everything static about one launch.

    Attributes:
      spec: What is computed.
      cache: Geometry of the cache.
      phases: The specialised loops, in the order they run.
      num_tokens: T, query tokens, padding included.
      pages_per_sequence: P, width of the page table.
      num_q_heads: Hq.
      q_dtype: Dtype of queries, keys and values as the caller has them.
      out_dtype: Dtype of the output.
      chip: What the kernel is compiled for.
      interpret: Run in Pallas TPU interpret mode.
    """

    spec: AttentionSpec
    cache: CacheLayout
    phases: tuple[PhaseConfig, ...]
    num_tokens: int
    pages_per_sequence: int
    num_q_heads: int
    q_dtype: np.dtype
    out_dtype: np.dtype
    chip: Chip = chips.UNKNOWN
    interpret: bool = False

    @property
    def num_kv_heads(self) -> int:
        return self.cache.num_kv_heads

    @property
    def group(self) -> int:
        """Query heads per key head (G)."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def io_group(self) -> int:
        """Query heads per key head in the arrays that the kernel sees.

        One more than there are if their number is odd and two of them share words:
        the last one is nothing.
        """
        packing = max(dtype_packing(self.q_dtype), dtype_packing(self.out_dtype))
        return self.group + (self.num_q_heads % 2 if packing > 1 else 0)

    @property
    def num_io_heads(self) -> int:
        """Query heads in the arrays that the kernel sees."""
        return self.io_group * self.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.cache.head_dim

    @property
    def lanes(self) -> int:
        return self.cache.lanes

    @property
    def io_lanes(self) -> int:
        """Length of a row of queries, keys, values and outputs in HBM.

        A short row is D long, and the hardware moves whole rows only. A row of more
        than one register is padded by the caller to whole registers.
        """
        return self.head_dim if self.head_dim < LANES else self.lanes

    @property
    def query_layout(self) -> TokenRows:
        """Where queries are."""
        return TokenRows(self.num_io_heads, self.io_lanes, self.q_dtype)

    @property
    def out_layout(self) -> TokenRows:
        """Where outputs are."""
        return TokenRows(self.num_io_heads, self.io_lanes, self.out_dtype)

    @property
    def lse_layout(self) -> TokenRows:
        """Where the logarithms of denominators are: query heads side by side."""
        return TokenRows(-(-self.num_q_heads // LANES), LANES, np.dtype(np.float32))

    @property
    def new_token_layout(self) -> TokenRows | HeadRows:
        """Where new keys are, and new values; see ``tokens_share_words``."""
        layout = HeadRows if self.tokens_share_words else TokenRows
        return layout(self.num_kv_heads, self.io_lanes, self.q_dtype)

    @property
    def tokens_share_words(self) -> bool:
        """Whether two new tokens of a key head share 32-bit words, not two heads.

        So an odd key head needs no partner.
        """
        return dtype_packing(self.q_dtype) > 1 and self.num_kv_heads % 2 == 1

    @property
    def new_heads_per_word(self) -> int:
        """Key heads that share a word of new keys, and of new values."""
        return 1 if self.tokens_share_words else dtype_packing(self.q_dtype)

    @functools.cached_property
    def numerics(self) -> Numerics:
        """Dtypes and factors."""
        return numerics.choose(
            self.spec,
            self.chip,
            q_dtype=self.q_dtype,
            cache_dtype=self.cache.dtype,
            lanes=self.lanes,
            array_options=self.spec.array_options,
        )

    @property
    def rows_per_chunk(self) -> int:
        """Packed rows that new tokens are merged by: one register."""
        return SUBLANES

    @property
    def tokens_per_chunk(self) -> int:
        return self.rows_per_chunk * self.cache.packing

    def heads_per_softmax_tile(self, phase: PhaseConfig) -> int:
        """Key heads that share one softmax tile.

        In decode a key head has few query rows, and a register has room for more.
        """
        rows = self.group * phase.block_q
        if not phase.is_decode or SUBLANES % rows:
            return 1
        return math.gcd(self.num_kv_heads, SUBLANES // rows)

    def query_rows(self, phase: PhaseConfig) -> int:
        """Query rows of the key heads that share a softmax tile, whole registers.

        They are the G query heads of each key head, times ``block_q`` tokens.
        """
        heads = self.group * self.heads_per_softmax_tile(phase)
        return align_to(heads * phase.block_q, SUBLANES)

    def softmax_rows(self, phase: PhaseConfig) -> int:
        """Query rows of one softmax tile; divides ``query_rows``."""
        return softmax_rows(self.query_rows(phase))


def softmax_rows(rows: int) -> int:
    """How many of some query rows, a multiple of 8, are in one softmax tile."""
    most = max(rows // SOFTMAX_TILE_ROWS, 1)
    count = max(n for n in range(1, most + 1) if rows % (n * SUBLANES) == 0)
    return rows // count

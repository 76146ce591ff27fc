"""Frozen values that fix a kernel at compile time, grouped by what they change.

* ``AttentionSpec`` changes answers.
* ``CacheLayout`` (layout.py) is fixed by the allocated cache.
* ``BlockSizes`` changes speed only.
* ``PhaseConfig`` is one of the specialised loops; ``KernelConfig`` is the whole.
"""

import dataclasses
import enum
import math

import jax.numpy as jnp
import numpy as np

from jax_kernels import chips
from jax_kernels.chips import Chip
from jax_kernels.contract import AttentionOptions
from jax_kernels.ragged_paged_attention.layout import LANES, CacheLayout, align_to

LOG2_E = math.log2(math.e)
SUBLANES = 8
# Rows whose scores are computed while those before them go through the softmax.
# Fewer push keys and values into the matrix units too often for their use.
SOFTMAX_TILE_ROWS = 512


class Phase(enum.Enum):
    """Which part of ``distribution`` a loop serves."""

    DECODE = "decode"
    PREFILL = "prefill"
    MIXED = "mixed"


@dataclasses.dataclass(frozen=True)
class AttentionSpec(AttentionOptions):
    """What is computed: the options, and whether there are sinks.

    Attributes:
      has_sinks: Whether ``sinks`` are given.
    """

    has_sinks: bool = False

    @property
    def query_multiplier(self) -> float:
        """Factor folded into the queries before they meet the keys.

        With quantised queries it is the inverse of their scale. Otherwise it holds
        every factor of the score, so that the score needs no further arithmetic.
        """
        return 1.0 / self.q_scale if self.q_scale else self._score_factor

    @property
    def score_multiplier(self) -> float:
        """Factor left for the product of (multiplied) queries and stored keys."""
        return self.q_scale * self._score_factor if self.q_scale else 1.0

    @property
    def _score_factor(self) -> float:
        # Scores are kept in units of log2, since the hardware has exp2 and not exp.
        # A soft cap needs them in units of the cap first.
        unit = LOG2_E if self.soft_cap is None else 1.0 / self.soft_cap
        return self.sm_scale * (self.k_scale or 1.0) * unit


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tile sizes. They change speed and rounding order, never the meaning.

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
      block_q: Query tokens per tile: 1 in decode.
      block_kv: Tokens of keys and values per cell.
      num_slots: Buffers in the ring of steps.
      lookahead: Steps whose DMAs run ahead of the one being computed. The
        ``num_slots - lookahead`` steps behind it may still be written back.
      cells_per_step: Cells that are fetched and computed together: more than 1 in
        decode only.
    """

    phase: Phase
    block_q: int
    block_kv: int
    num_slots: int
    lookahead: int
    cells_per_step: int = 1

    def __post_init__(self):
        if not 0 < self.lookahead < self.num_slots:
            raise ValueError(f"expected 0 < {self.lookahead=} < {self.num_slots=}")

    @property
    def is_decode(self) -> bool:
        return self.phase is Phase.DECODE

    @property
    def num_tile_slots(self) -> int:
        """Buffers in the rings of queries and outputs.

        In decode every step has its own. The queries of a tile are prepared before
        those of the next are fetched, and its output has a tile's time to land.
        """
        return self.num_slots if self.is_decode else 1

    @property
    def num_new_token_slots(self) -> int:
        """Buffers of new tokens. Tiles merge theirs before the next are fetched."""
        return self.num_slots if self.is_decode else 1


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Everything static about one launch.

    Attributes:
      spec: What is computed.
      cache: Geometry of the cache.
      phases: The specialised loops, in the order they run.
      num_tokens: T, rows of the query array, padding included.
      pages_per_sequence: P, width of the page table.
      num_q_heads: Hq.
      q_dtype: Dtype of queries, keys and values as the caller has them.
      io_dtype: Dtype in which the kernel sees them: wider when heads are odd.
      out_dtype: Dtype of the output as the kernel writes it.
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
    io_dtype: np.dtype
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
    def multiply_dtype(self) -> np.dtype:
        """Dtype in which queries meet keys: the cache's if queries are quantised."""
        return self.cache.dtype if self.spec.q_scale else self.value_dtype

    @property
    def value_dtype(self) -> np.dtype:
        """Dtype in which probabilities meet values: the wider of queries and cache."""
        is_wide = jnp.float32 in (self.q_dtype, self.cache.dtype)
        return jnp.dtype(jnp.float32 if is_wide else jnp.bfloat16)

    @property
    def reads_e4m3_shifted(self) -> bool:
        """Whether e4m3fn is multiplied as e4m3b11fnuz, the e4m3 of the chip.

        The same bits are a power of two less there. Other factors make up for it, which
        the compiler would apply to every score and every product instead.
        """
        return (
            self.chip.e4m3_bias != chips.E4M3FN_BIAS
            and self.cache.dtype == jnp.float8_e4m3fn
            and self.value_dtype == jnp.bfloat16
        )

    @property
    def query_multiplier(self) -> float:
        """Factor folded into the queries."""
        # Quantised queries meet keys in the dtype of the cache.
        shifts = self.reads_e4m3_shifted and not self.spec.q_scale
        return self.spec.query_multiplier * (self._e4m3_shift if shifts else 1.0)

    @property
    def output_scale(self) -> float:
        """Factor of the weighted values."""
        shift = self._e4m3_shift if self.reads_e4m3_shifted else 1.0
        return (self.spec.v_scale or 1.0) * shift

    @property
    def _e4m3_shift(self) -> float:
        return 2.0 ** (self.chip.e4m3_bias - chips.E4M3FN_BIAS)

    @property
    def rounds_in_software(self) -> bool:
        """Whether the chip has no instruction that packs new tokens for the cache."""
        return self.cache.dtype == jnp.float8_e4m3fn and not self.chip.rounds_to_e4m3fn

    @property
    def rounds_in_16_bits(self) -> bool:
        """Whether ``tile_io.bfloat16_to_e4m3fn`` packs the new tokens."""
        is_bfloat16 = self.io_dtype == jnp.bfloat16
        has_scale = self.spec.k_scale is not None or self.spec.v_scale is not None
        return (
            self.rounds_in_software
            and self.chip.adds_in_16_bits
            and is_bfloat16
            and not has_scale
        )

    @property
    def rows_per_chunk(self) -> int:
        """Packed rows that new tokens are merged by: one register."""
        return SUBLANES

    @property
    def tokens_per_chunk(self) -> int:
        return self.rows_per_chunk * self.cache.packing

    def heads_per_tile(self, phase: PhaseConfig) -> int:
        """Key heads that share one softmax tile.

        In decode a key head has G rows only, and a register has room for more.
        """
        if not phase.is_decode or SUBLANES % self.group:
            return 1
        return math.gcd(self.num_kv_heads, SUBLANES // self.group)

    def query_rows(self, phase: PhaseConfig) -> int:
        """Rows of the key heads that share a tile, whole registers.

        They are the G query heads of each key head, times ``block_q`` tokens.
        """
        heads = self.group * self.heads_per_tile(phase)
        return align_to(heads * phase.block_q, SUBLANES)

    def softmax_rows(self, phase: PhaseConfig) -> int:
        """Rows of one softmax tile; divides ``query_rows``."""
        rows = self.query_rows(phase)
        most = max(rows // SOFTMAX_TILE_ROWS, 1)
        count = max(n for n in range(1, most + 1) if rows % (n * SUBLANES) == 0)
        return rows // count

    @property
    def sums_in_matrix_unit(self) -> bool:
        """Whether the matrix units have columns to spare for sums."""
        is_wider = self.lanes < self.chip.matrix_columns
        return is_wider and self.value_dtype == jnp.bfloat16

"""Block sizes that fit, by construction, and the error when given ones do not."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jax_kernels import chips, tuned
from jax_kernels.chips import MIB, Chip
from jax_kernels.ragged_paged_attention import layout
from jax_kernels.ragged_paged_attention.config import (
    MAX_STRETCH_SCORES,
    SOFTMAX_TILE_ROWS,
    AttentionSpec,
    BlockSizes,
    KernelConfig,
    Phase,
    PhaseConfig,
)
from jax_kernels.ragged_paged_attention.kernel import padding, refs
from jax_kernels.ragged_paged_attention.kernel.decode import buffers as decode_buffers
from jax_kernels.ragged_paged_attention.kernel.tiles import buffers as tile_buffers
from jax_kernels.ragged_paged_attention.validation import Problem

# Share of VMEM given to the kernel; the rest is left to the program around it.
VMEM_LIMIT_SHARE = 0.95
# Share of that limit that buffers may take by default; the compiler spills to the rest.
DEFAULT_BUFFER_SHARE = 0.97
# Softmax tiles, as f32 scores, that the compiler keeps in VMEM besides the buffers: as
# seen in its reports, rounded up.
SPILLED_TILES, DECODE_SPILLED_TILES = 6.5, 4
# The compiler keeps some SMEM for itself and needs more for spilled scalars.
SMEM_RESERVE_BYTES = 128 * 1024

# Of a decode cell and of a decode step. A step takes longer than the latency of HBM,
# so that the fetch of the next one is hidden; shorter steps would start sooner. Short
# contexts fetch and compute less of a block.
DECODE_CELL_TOKENS = 512
# A window is met at once even if that takes a larger cell than others have.
MIN_CELL_BYTES, MIN_WINDOW_CELL_BYTES, MAX_CELL_BYTES = MIB // 2, MIB, 2 * MIB
# Small blocks share a step, which is an eighth of VMEM at the most.
STEP_BYTES, STEP_VMEM_SHARE = 4 * MIB, 8
MAX_CELLS_PER_STEP = 16
# Shorter blocks are for contexts, or for memory, that are small altogether.
MIN_BLOCK_OF_MANY_CELLS, MAX_CELLS_OF_SHORT_BLOCKS = 256, 4
# With a window, cells hold what a query sees wherever it begins in a page of so many
# tokens, or in so many tokens of a larger page.
MAX_WINDOW_OFFSET = 128
MIN_BLOCK_KV, MAX_BLOCK_KV = 128, 4096
# Long blocks update the softmax state less often; short ones of many heads leave room
# for more queries.
PREFILL_FETCH_BYTES = 8 * MIB
MIN_PREFILL_BLOCK_KV, MAX_PREFILL_BLOCK_KV = 512, 1024
PREFILL_TILE_ROWS = 1024
# With fewer key heads a cell is too little work for its start, unless it has more rows.
MIN_PREFILL_HEADS = 4
MIN_BLOCK_Q = 32  # rows of an 8-bit register tile

# What to halve until decode fits, and down to where.
_SMALLER_DECODE = (("decode_block_kv", 32),)

# (slots, steps fetched ahead). The write-back of a decode step must have time to land
# before its slot is filled again.
DECODE_RING = (4, 2)
# Where a step has many pages, their copies are started in the shadow of vector work:
# later, so one step more is fetched ahead. Each of two rings holds half of the slots.
DECODE_RINGS = (6, 3)
PAGES_IN_SHADOW = range(17, 161)
MIN_VMEM_OF_TWO_RINGS = 64 * MIB
PREFILL_RING = (3, 2)
# Decodes in tiles have little to compute, so the latency of HBM takes more cells.
DECODE_TILES_RING = (6, 4)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Block sizes, and where they come from.

    Attributes:
      blocks: As the kernel will have them.
      decode_source: Of ``decode_block_kv``: what was tuned, or "model".
      prefill_source: Of ``block_q`` and ``block_kv``.
    """

    blocks: BlockSizes
    decode_source: str
    prefill_source: str


def choose(problem: Problem, spec: AttentionSpec, chip: Chip) -> BlockSizes:
    """Default block sizes that fit ``chip``: the tuned ones, or the cost model's."""
    return explain(problem, spec, chip).blocks


def explain(
    problem: Problem,
    spec: AttentionSpec,
    chip: Chip,
    records: Iterable[tuned.TunedBlocks] | None = None,
) -> Choice:
    """What ``choose`` gives and why.

    Each phase takes the sizes tuned for its shape on this chip. Else those of the
    model, as many times larger or smaller as was best for the nearest shape
    (``tuned.distance``), if one is near. All are then cut to the context, the number of
    tokens and the VMEM of the chip.

    With ``batch_invariant`` they are the same for all numbers of tokens, sequences and
    pages.

    Args:
      problem: Static sizes.
      spec: What is computed.
      chip: Where.
      records: Tuned sizes; by default ``tuned.in_force()``.
    """
    if spec.batch_invariant:
        return _invariant(problem, spec, chip)
    records = tuned.in_force() if records is None else tuple(records)
    shape = tuned_shape(problem, spec)
    model = dataclasses.asdict(preferred(problem, spec))
    sizes, sources = dict(model), {}
    for phase in tuned.PHASES:
        found = tuned.find(records, chip.name, phase, shape)
        sources[phase] = "model"
        if found:
            record, away = found
            sizes |= record.carried_over(model) if away else record.blocks
            sources[phase] = f"tuned for {record.shape}" if away else "tuned"
    blocks = fit(problem, spec, chip, BlockSizes(**sizes))
    return Choice(blocks, sources["decode"], sources["prefill"])


def _invariant(problem: Problem, spec: AttentionSpec, chip: Chip) -> Choice:
    """Sizes that follow from the heads, the cache and the chip alone."""
    blocks = preferred(problem, spec)
    pages = -(-blocks.block_kv // problem.cache.page_size)
    problem = dataclasses.replace(
        problem, num_tokens=blocks.block_q, pages_per_sequence=pages
    )
    return Choice(fit(problem, spec, chip, blocks), "model", "model")


def tuned_shape(problem: Problem, spec: AttentionSpec) -> tuned.TunedShape:
    """The part of a problem that block sizes are tuned for."""
    return tuned.TunedShape(
        q_dtype=problem.q_dtype.name,
        cache_dtype=problem.cache.dtype.name,
        num_q_heads=problem.num_q_heads,
        num_kv_heads=problem.num_kv_heads,
        head_dim=problem.head_dim,
        page_size=problem.cache.page_size,
        sliding_window=spec.sliding_window,
    )


def preferred(problem: Problem, spec: AttentionSpec) -> BlockSizes:
    """The sizes that the cost model gives, before they are cut to what there is.

    With a window, a block is no larger than all that a decode query, or a tile of
    prefill, may see. A decode query sees the window from any place in a page on.
    """
    least, most = (
        _power_of_two_below(size // problem.cache.token_bytes)
        for size in (
            MIN_CELL_BYTES if spec.sliding_window is None else MIN_WINDOW_CELL_BYTES,
            MAX_CELL_BYTES,
        )
    )
    cell = min(max(DECODE_CELL_TOKENS, least), most, MAX_BLOCK_KV)
    tile_rows = PREFILL_TILE_ROWS * max(MIN_PREFILL_HEADS // problem.num_kv_heads, 1)
    block_q = _power_of_two_below(tile_rows // problem.num_q_heads_per_kv_head)
    block = _power_of_two_below(PREFILL_FETCH_BYTES // problem.cache.token_bytes)
    block = max(MIN_PREFILL_BLOCK_KV, min(block, MAX_PREFILL_BLOCK_KV))
    if spec.sliding_window is not None:
        seen = spec.sliding_window + spec.decode_q_len - 1
        offset = min(problem.cache.page_size, MAX_WINDOW_OFFSET) - 1
        if _is_one_cell(spec, cell):
            cell = spec.sliding_window
        cell = min(cell, _power_of_two_above(seen + offset))
        block = min(block, _power_of_two_above(spec.sliding_window + block_q))
    return BlockSizes(
        decode_block_kv=max(MIN_BLOCK_KV, cell),
        block_q=block_q,
        block_kv=max(MIN_BLOCK_KV, block),
    )


def _is_one_cell(spec: AttentionSpec, largest: int) -> bool:
    """Whether a cell of the window's size holds all that a decode query sees."""
    window = spec.sliding_window
    if window is None or window.bit_count() > 1 or spec.decode_q_len > 1:
        return False
    if spec.attend != "all":
        return False
    return MIN_BLOCK_KV <= window <= largest


def fit(
    problem: Problem, spec: AttentionSpec, chip: Chip, blocks: BlockSizes
) -> BlockSizes:
    """Cuts block sizes to the context, the tokens and the VMEM there is."""
    context = _power_of_two_above(problem.pages_per_sequence * problem.cache.page_size)
    least_kv = min(MIN_BLOCK_KV, max(context, 32))

    def clamp_kv(size: int) -> int:
        return max(least_kv, min(size, context))

    tokens = _power_of_two_above(problem.num_tokens)
    blocks = BlockSizes(
        decode_block_kv=clamp_kv(
            min(blocks.decode_block_kv, _most_decode_tokens(problem, spec))
        ),
        block_q=max(MIN_BLOCK_Q, min(blocks.block_q, tokens)),
        block_kv=clamp_kv(blocks.block_kv),
    )
    budget = int(chip.vmem_bytes * VMEM_LIMIT_SHARE * DEFAULT_BUFFER_SHARE)
    for is_decode, steps in (
        (True, _SMALLER_DECODE),
        (False, _smaller_prefill(problem)),
    ):

        def exceeds(blocks: BlockSizes, is_decode=is_decode) -> bool:
            config = make_config(problem, spec, blocks, None, False, chip)
            phases = tuple(p for p in config.phases if p.is_decode == is_decode)
            return vmem_bytes(dataclasses.replace(config, phases=phases)) > budget

        while exceeds(blocks):
            smaller = _next_smaller(blocks, steps)
            if smaller == blocks:
                break  # ``check_fits`` says what does not fit.
            blocks = smaller
    return blocks


def _most_decode_tokens(problem: Problem, spec: AttentionSpec) -> int:
    """Tokens of a decode cell, so that the code of a stretch does not get too long."""
    blocks = BlockSizes(MIN_BLOCK_KV, MIN_BLOCK_Q, MIN_BLOCK_KV)
    config = make_config(problem, spec, blocks, None, False)
    query_rows = config.query_rows(config.phases[0])
    return _power_of_two_below(MAX_STRETCH_SCORES // (query_rows * MAX_CELLS_PER_STEP))


def _smaller_prefill(problem: Problem) -> tuple[tuple[str, int], ...]:
    """What to halve until prefill fits, and down to where.

    Shorter blocks cost less than softmax tiles of fewer rows.
    """
    group = problem.num_q_heads_per_kv_head
    whole_tile = _power_of_two_below(SOFTMAX_TILE_ROWS // group)
    return (
        ("block_q", max(whole_tile, 2 * MIN_BLOCK_Q)),
        ("block_kv", MIN_PREFILL_BLOCK_KV),
        ("block_q", 2 * MIN_BLOCK_Q),
        ("block_kv", 2 * MIN_BLOCK_KV),
        ("block_q", MIN_BLOCK_Q),
        ("block_kv", 32),
    )


def _next_smaller(blocks: BlockSizes, steps: tuple[tuple[str, int], ...]) -> BlockSizes:
    for name, least in steps:
        size = getattr(blocks, name)
        if size > least:
            return dataclasses.replace(blocks, **{name: size // 2})
    return blocks


def make_config(
    problem: Problem,
    spec: AttentionSpec,
    blocks: BlockSizes,
    chunk_prefill_size: int | None,
    interpret: bool,
    chip: Chip = chips.UNKNOWN,
) -> KernelConfig:
    """The kernel configuration of a problem at given block sizes."""
    config = KernelConfig(
        spec=spec,
        cache=problem.cache,
        phases=(),
        num_tokens=problem.num_tokens,
        pages_per_sequence=problem.pages_per_sequence,
        num_q_heads=problem.num_q_heads,
        q_dtype=problem.q_dtype,
        out_dtype=problem.out_dtype,
        chip=chip,
        interpret=interpret,
    )
    mixed = _phase(Phase.MIXED, problem, spec, blocks, blocks.block_q, chip)
    if spec.batch_invariant:
        # Few rows for few tokens. Their number does not change the bits of a row.
        decode = _phase(Phase.DECODE_TILES, problem, spec, blocks, MIN_BLOCK_Q, chip)
        if not spec.hides_first_keys:
            # Masks of few queries cost little. With a running maximum, a chunk of
            # another size would have another one.
            decode = dataclasses.replace(decode, chunk_kv=blocks.block_kv)
        return dataclasses.replace(config, phases=(decode, mixed))
    decode_block_q = _power_of_two_above(spec.decode_q_len)
    decode = _phase(Phase.DECODE, problem, spec, blocks, decode_block_q, chip)
    phases = [_with_cells_that_fit(config, decode)]
    if chunk_prefill_size is not None:
        block_q = min(blocks.block_q, _power_of_two_above(chunk_prefill_size))
        block_q = max(block_q, MIN_BLOCK_Q)
        phases.append(_phase(Phase.PREFILL, problem, spec, blocks, block_q, chip))
    return dataclasses.replace(config, phases=(*phases, mixed))


def _phase(
    phase: Phase,
    problem: Problem,
    spec: AttentionSpec,
    blocks: BlockSizes,
    block_q: int,
    chip: Chip,
) -> PhaseConfig:
    if phase is Phase.DECODE:
        slots, lookahead = DECODE_RING
        cell_bytes = blocks.decode_block_kv * problem.cache.token_bytes
        step_bytes = min(STEP_BYTES, chip.vmem_bytes // STEP_VMEM_SHARE)
        is_window = block_q == 1 and blocks.decode_block_kv == spec.sliding_window
        is_window &= spec.attend == "all"
        is_short = blocks.decode_block_kv < MIN_BLOCK_OF_MANY_CELLS and not is_window
        most = MAX_CELLS_OF_SHORT_BLOCKS if is_short else MAX_CELLS_PER_STEP
        cells = min(max(step_bytes // cell_bytes, 1), most)
        num_kv_rings = 1
        pages = max(blocks.decode_block_kv // problem.cache.page_size, 1)
        # A window begins in the middle of a page.
        pages = cells * (pages + is_window)
        fits = chip.vmem_bytes >= MIN_VMEM_OF_TWO_RINGS
        if fits and cells > 1 and pages in PAGES_IN_SHADOW:
            (slots, lookahead), num_kv_rings = DECODE_RINGS, 2
        return PhaseConfig(
            phase,
            block_q,
            blocks.decode_block_kv,
            slots,
            lookahead,
            cells,
            num_kv_rings,
        )
    is_decode = phase is Phase.DECODE_TILES
    slots, lookahead = DECODE_TILES_RING if is_decode else PREFILL_RING
    return PhaseConfig(phase, block_q, blocks.block_kv, slots, lookahead)


def _with_cells_that_fit(config: KernelConfig, decode: PhaseConfig) -> PhaseConfig:
    """Fewer cells in a step of decode, where the queries of many take all VMEM.

    So it is with several new tokens of many heads, however short the blocks are.
    """
    limit = int(config.chip.vmem_bytes * VMEM_LIMIT_SHARE)
    while decode.cells_per_step > 1:
        if vmem_bytes(dataclasses.replace(config, phases=(decode,))) <= limit:
            break
        slots, lookahead = DECODE_RING
        decode = dataclasses.replace(
            decode,
            cells_per_step=decode.cells_per_step // 2,
            num_slots=slots,
            lookahead=lookahead,
            num_kv_rings=1,
        )
    return decode


def vmem_bytes(config: KernelConfig) -> int:
    """VMEM that the kernel's buffers take: the phases never run together."""
    cleared = _buffer_bytes(padding.cleared_shapes(config))
    sizes = (_phase_bytes(config, phase) for phase in config.phases)
    return cleared + max(sizes, default=0)


def _phase_bytes(config: KernelConfig, phase: PhaseConfig) -> int:
    buffers = decode_buffers if phase.is_decode else tile_buffers
    total = _buffer_bytes(buffers.shapes(config, phase))
    rows = config.query_rows(phase) if phase.is_decode else config.softmax_rows(phase)
    scores = rows * phase.block_kv * phase.cells_per_step
    num_tiles = DECODE_SPILLED_TILES if phase.is_decode else SPILLED_TILES
    return total + int(num_tiles * scores * 4)


def _buffer_bytes(shapes: Any) -> int:
    """VMEM of a tree of buffers: a row shorter than a register takes a whole one."""
    return sum(
        math.prod(buffer.shape[:-1])
        * layout.align_to(buffer.shape[-1], layout.LANES)
        * jnp.dtype(buffer.dtype).itemsize
        for buffer in jax.tree.leaves(shapes, is_leaf=refs.is_shaped)
    )


def smem_bytes(problem: Problem) -> int:
    """SMEM that lengths and page table take."""
    sequences, pages = problem.num_sequences, problem.pages_per_sequence
    return 4 * (sequences * pages + 2 * sequences + 1 + 3 + problem.num_q_heads)


def check_fits(
    problem: Problem, config: KernelConfig, chip: Chip, vmem_limit_bytes: int
) -> None:
    """Raises with the estimate and what to change when something does not fit.

    Raises:
      ValueError: The buffers exceed ``vmem_limit_bytes``, the page table exceeds
        SMEM, or a block is smaller than what the layout moves at once.
    """
    for phase in config.phases:
        name = "decode_block_kv" if phase.is_decode else "block_kv"
        if phase.block_kv < config.tokens_per_chunk:
            raise ValueError(
                f"block_sizes.{name}: expected at least {config.tokens_per_chunk} for "
                f"a {config.cache.dtype} cache, got {phase.block_kv}"
            )
        if not phase.is_decode and phase.block_q < MIN_BLOCK_Q:
            raise ValueError(
                f"block_sizes.block_q: expected at least {MIN_BLOCK_Q}, got "
                f"{phase.block_q}"
            )
    needed = vmem_bytes(config)
    if needed > vmem_limit_bytes:
        raise ValueError(
            f"block_sizes: the buffers need about {needed:,} bytes of VMEM, more than "
            f"the limit of {vmem_limit_bytes:,} on chip {chip.name}; use smaller "
            "block_q, block_kv or decode_block_kv, or raise vmem_limit_bytes"
        )
    available = chip.smem_bytes - SMEM_RESERVE_BYTES
    if smem_bytes(problem) > available:
        raise ValueError(
            f"page_indices: lengths and page table need {smem_bytes(problem):,} bytes "
            f"of SMEM ({problem.num_sequences} sequences x "
            f"{problem.pages_per_sequence} pages), more than the {available:,} "
            f"available on chip {chip.name}; use fewer sequences, a larger page_size "
            "or fewer pages per sequence"
        )


def _power_of_two_above(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def _power_of_two_below(value: int) -> int:
    return 1 << max(value, 1).bit_length() - 1

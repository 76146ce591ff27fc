"""One step of decode: cells of one query token and one block of keys and values each.

Everything from queries to outputs is one stretch of code without branches, and the
planning of a later step is part of it: scalar work, the merge of new tokens, the
softmax of one cell and the matmuls of another all run in each other's shadow. What
does not apply to a cell is computed all the same and discarded by a select.

The stretch exists in several sizes, so that short contexts do not pay for long blocks.

Softmax tiles: the rows of a register are the query heads of several key heads, when
the G heads of one do not fill it. Scores and values are computed for all rows with
each of the key heads, and every row takes its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.config import LOG2_E, SUBLANES, KernelConfig
from jax_kernels.ragged_paged_attention.kernel import (
    masking,
    new_tokens,
    online_softmax,
    tile_io,
)
from jax_kernels.ragged_paged_attention.kernel.block_loads import (
    largest_divisor,
    load_keys,
    load_values,
    value_words_mask,
)
from jax_kernels.ragged_paged_attention.kernel.decode.steps import DecodeCell
from jax_kernels.ragged_paged_attention.kernel.online_softmax import SoftmaxState
from jax_kernels.ragged_paged_attention.kernel.phase import StepCopies
from jax_kernels.ragged_paged_attention.kernel.schedule import Int, log2
from jax_kernels.ragged_paged_attention.layout import LANES, dtype_packing

# Key heads that share one stretch of code; even, since two bf16 heads share a word.
MAX_STRETCH_HEADS = 8
# The smallest stretch, in tokens of a cell; each further one is twice as long.
MIN_STRETCH_TOKENS = 256
# Scores that wait for their softmax while the matrix units compute the next ones.
SCORE_REGISTERS = 32


def prepare(copies: StepCopies) -> None:
    """Lays out the sinks once per launch, as the maxima that rows start from."""
    config, sinks = copies.config, copies.buffers.sinks
    if sinks is None:
        return
    sinks[...] = jnp.zeros(sinks.shape, jnp.float32)
    rows_per_tile = config.group * config.heads_per_tile(copies.schedule.phase)
    for query_head in range(config.num_q_heads):
        tile, row = divmod(query_head, rows_per_tile)
        logit = copies.inputs.sinks[query_head] * LOG2_E
        sinks[tile, pl.ds(row, 1), :] = jnp.full((1, sinks.shape[-1]), logit)


def compute(
    copies: StepCopies, cells: Sequence[DecodeCell], slot: Int, plan: Callable[[], Any]
) -> Any:
    """Computes the step in a slot, and plans a later one on the way.

    Returns:
      The result of ``plan``.
    """
    sizes = _stretch_sizes(copies.schedule.phase.block_kv)
    extent = functools.reduce(jnp.maximum, (cell.visible_end for cell in cells))
    index = sum((extent > size).astype(jnp.int32) for size in sizes[:-1])
    stretches = [
        functools.partial(_compute_stretch, copies, cells, slot, plan, size)
        for size in sizes
    ]
    return lax.switch(index + jnp.int32(0), stretches)


def _stretch_sizes(block_kv: int) -> list[int]:
    """Tokens of a cell that each stretch computes, ascending."""
    sizes = [min(MIN_STRETCH_TOKENS, block_kv)]
    while sizes[-1] < block_kv:
        sizes.append(2 * sizes[-1])
    return sizes


def _compute_stretch(
    copies: StepCopies, cells: Sequence[DecodeCell], slot: Int, plan, size: int
):
    """All cells of a step, ``size`` tokens each."""
    num_tiles = copies.buffers.m.shape[1]
    tiles_per_group = _tiles_per_group(copies)

    def attend(first_tile: Int, plan) -> None:
        tiles = [first_tile + i for i in range(tiles_per_group)]
        return _attend(copies, cells, slot, tiles, size, plan)

    groups = num_tiles // tiles_per_group
    if groups > 1:
        lax.fori_loop(
            0, groups - 1, lambda i, _: attend(i * tiles_per_group, None), None
        )
    return attend((groups - 1) * tiles_per_group, plan)


def _tiles_per_group(copies: StepCopies) -> int:
    """Softmax tiles in one stretch: the most whose word rows are not shared."""
    config = copies.config
    heads = config.heads_per_tile(copies.schedule.phase)
    num_tiles = config.num_kv_heads // heads
    packing = max(dtype_packing(config.io_dtype), dtype_packing(config.out_dtype))
    if heads % packing == 0 or config.num_kv_heads % packing:
        # Either a tile has whole words, or key heads have words of their own.
        packing = 1
    return packing * largest_divisor(
        num_tiles // packing, max(MAX_STRETCH_HEADS // (heads * packing), 1)
    )


def _attend(
    copies: StepCopies,
    cells: Sequence[DecodeCell],
    slot: Int,
    tiles: Sequence[Int],
    size: int,
    plan,
):
    """Some softmax tiles of all cells.

    The source order is the pipeline: the scores of the next cell are computed before
    the softmax and the values of the present one, so that the matrix units and the
    vector units have work at the same time. Of one cell, all scores come first, then
    all softmaxes: tile by tile, the matrix units would wait for every softmax.
    """
    config, buffers = copies.config, copies.buffers
    phase = copies.schedule.phase
    works = [_CellWork.make(copies, cells, slot, i, size) for i in range(len(cells))]
    states = [
        SoftmaxState(buffers.m[0, tile], buffers.l[0, tile], buffers.acc[0, tile])
        for tile in tiles
    ]
    registers_per_cell = pl.cdiv(
        len(tiles) * config.query_rows(phase) * size, SUBLANES * LANES
    )
    ahead = min(max(SCORE_REGISTERS // registers_per_cell, 1), len(works))
    scores = [work.scores(tiles) for work in works[:ahead]]
    # Scalar work has slots of its own, so it is cheapest next to most vector work.
    progress = None if plan is None else plan()
    for index, work in enumerate(works):
        if index + ahead < len(works):
            scores.append(works[index + ahead].scores(tiles))
        states = work.attend(tiles, states, scores[index])
        work.store_output(tiles, states)
    for tile, state in zip(tiles, states, strict=True):
        buffers.m[0, tile], buffers.l[0, tile] = state.m, state.l
        buffers.acc[0, tile] = state.acc
    return progress


@dataclasses.dataclass(frozen=True)
class _CellWork:
    """The vector work of one cell of a stretch.

    Attributes:
      copies: Gives buffers and geometry.
      cell: The cell.
      slot: Slot of the step.
      index: Number of the cell within the step.
      size: Tokens of the block to compute.
      mask: bool[1, size], the tokens that the query sees.
      words_mask: u32[size // packing, 1], see ``value_words_mask``.
    """

    copies: StepCopies
    cell: DecodeCell
    slot: Int
    index: int
    size: int
    mask: jax.Array
    words_mask: jax.Array

    @classmethod
    def make(
        cls,
        copies: StepCopies,
        cells: Sequence[DecodeCell],
        slot: Int,
        index: int,
        size: int,
    ) -> "_CellWork":
        config, cell = copies.config, cells[index]
        visible = cell.visible_begin, cell.visible_end, size
        return cls(
            copies,
            cell,
            slot,
            index,
            size,
            mask=masking.decode_mask(*visible, config.spec),
            words_mask=value_words_mask(*visible, config),
        )

    @property
    def config(self) -> KernelConfig:
        return self.copies.config

    @property
    def heads_per_tile(self) -> int:
        return self.config.heads_per_tile(self.copies.schedule.phase)

    @property
    def first_row(self) -> int:
        """Of the cell's block among the rows of the slot."""
        return self.index * self.copies.schedule.block_rows

    def scores(self, tiles: Sequence[Int]) -> list[jax.Array]:
        """f32[query rows, size] of each tile, masked; merges the new token first."""
        config, kv = self.config, self.copies.buffers.kv.at[self.slot]
        packing = dtype_packing(config.io_dtype)
        first_head = tiles[0] * self.heads_per_tile
        scores = []
        for offset in range(len(tiles)):
            rows_before = offset * self.heads_per_tile * config.group
            q = self._load_query(tiles[offset], rows_before % packing)
            by_head = []
            for head_offset in self._head_offsets(offset):
                if config.spec.update_kv_cache and head_offset % packing == 0:
                    # Just before its head, so that the matrix units start at once.
                    self._merge((first_head >> log2(packing)) + head_offset // packing)
                k = load_keys(
                    kv,
                    first_head + head_offset,
                    self.size,
                    config,
                    few_queries=True,
                    first_row=self.first_row,
                )
                by_head.append(online_softmax.products(q, k))
            s = online_softmax.finish_scores(self._own_rows(by_head), config.spec)
            scores.append(jnp.where(self.mask, s, online_softmax.MASKED_SCORE))
        return scores

    def attend(
        self,
        tiles: Sequence[Int],
        states: Sequence[SoftmaxState],
        scores: Sequence[jax.Array],
    ) -> list[SoftmaxState]:
        """The states of the tiles with this cell's keys and values added."""
        config, kv = self.config, self.copies.buffers.kv.at[self.slot]
        weighted = []
        for tile, state, s in zip(tiles, states, scores, strict=True):
            state = self._start_state(tile, state)
            p, m, correction = online_softmax.probabilities(s, state.m)
            weighted.append((p, correction, state._replace(m=m)))
        first_head = tiles[0] * self.heads_per_tile
        results = []
        for offset, (p, correction, state) in enumerate(weighted):
            by_head = []
            for head_offset in self._head_offsets(offset):
                v = load_values(
                    kv,
                    first_head + head_offset,
                    self.size,
                    self.words_mask,
                    config,
                    few_queries=True,
                    first_row=self.first_row,
                )
                sums = online_softmax.accumulate(
                    p, v, correction, state.l, state.acc, config.value_dtype
                )
                by_head.append(sums)
            acc = self._own_rows([acc for _, acc in by_head])
            results.append(SoftmaxState(state.m, by_head[0][0], acc))
        return results

    def store_output(
        self, tiles: Sequence[Int], states: Sequence[SoftmaxState]
    ) -> None:
        """Normalises, and lays the heads out as the output array has them.

        Only the output after the last block of a sequence is sent. The others are
        overwritten or, where there is no query, in a place that is never sent.
        """
        config, buffers = self.config, self.copies.buffers
        packing = dtype_packing(config.out_dtype)
        rows = tile_io.WordRows(
            buffers.out.at[self.slot, self.cell.out], config.interpret
        )
        outs = [
            tile_io.value_lanes_first(
                online_softmax.normalise(state, config.output_scale), config.cache
            )[:, : config.io_lanes]
            for state in states
        ]
        rows_per_tile = self.heads_per_tile * config.group
        if rows_per_tile % packing == 0:
            words_per_tile = rows_per_tile // packing
            for tile, out in zip(tiles, outs, strict=True):
                words = tile_io.pack_rows(out, packing)[:words_per_tile]
                rows.store(words, tile * words_per_tile)
            return
        # A word row holds heads of two tiles.
        members = [out[g : g + 1] for out in outs for g in range(rows_per_tile)]
        first = (tiles[0] * rows_per_tile) >> log2(packing)
        for index in range(len(members) // packing):
            pair = members[index * packing : (index + 1) * packing]
            rows.store(tile_io.pack_heads(pair, config.interpret), first + index)

    def _head_offsets(self, tile_offset: int) -> range:
        """The key heads of a tile, counted from the first one of the stretch."""
        first = tile_offset * self.heads_per_tile
        return range(first, first + self.heads_per_tile)

    def _own_rows(self, by_head: Sequence[jax.Array]) -> jax.Array:
        """Takes from each key head's array the rows of its own query heads."""
        own = by_head[0]
        row = lax.broadcasted_iota(jnp.int32, (own.shape[0], 1), 0)
        for index, array in enumerate(by_head[1:], start=1):
            own = jnp.where(row >= index * self.config.group, array, own)
        return own

    def _start_state(self, tile: Int, state: SoftmaxState) -> SoftmaxState:
        """The state so far or, in the first block of a sequence, that without keys."""
        sinks, is_first = self.copies.buffers.sinks, self.cell.is_first > 0
        # A sink counts as one key with its logit and a zero value.
        start_m = online_softmax.NO_KEY_MAX if sinks is None else sinks[tile]
        start_l = 0.0 if sinks is None else 1.0
        return SoftmaxState(
            m=jnp.where(is_first, start_m, state.m),
            l=jnp.where(is_first, start_l, state.l),
            acc=jnp.where(is_first, 0.0, state.acc),
        )

    def _merge(self, pair: Int) -> None:
        new_tokens.merge_one(self.copies, self.cell, self.slot, self.index, pair)

    def _load_query(self, tile: Int, parity: int) -> jax.Array:
        """[query rows, lanes] of one tile: multiplied and cast.

        The rows past those of the tile belong to other heads or to nobody. Rows never
        mix, so they are computed and ignored.

        Args:
          tile: Number of the tile.
          parity: Where its first row sits in its word row, known at compile time.
        """
        config = self.config
        packing = dtype_packing(config.io_dtype)
        num_rows = config.query_rows(self.copies.schedule.phase)
        source = self.copies.buffers.queries.at[self.slot, self.cell.query]
        rows = tile_io.WordRows(source, config.interpret)
        first = (tile * self.heads_per_tile * config.group) >> log2(packing)
        if packing == 1:
            x = pltpu.bitcast(rows.load(first, num_rows), jnp.float32)
        else:
            words = rows.load(first, num_rows // packing + (SUBLANES if parity else 0))
            x = pltpu.bitcast(words, jnp.bfloat16).astype(jnp.float32)
            x = x[parity : parity + num_rows]
        return tile_io.prepare_queries(tile_io.widen(x, config.lanes), config)

"""One step of decode: cells of few query tokens and one block of keys and values each.

Everything from queries to outputs is one stretch of code without branches, and the
planning of a later step is part of it: scalar work, the merge of new tokens, the
softmax of one cell and the matmuls of another all run in each other's shadow. What
does not apply to a cell is computed all the same and discarded by a select.

The stretch exists in several sizes, so that short contexts do not pay for long blocks.

Softmax tiles: the query rows of a key head are those of its first query head for all
tokens, then those of the next head. Where they do not fill a register, several key
heads share one. Scores and values are computed for all rows with
each of the key heads, and every row takes its own. Many softmax tiles take turns, in
*rounds* of the same code.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention.config import (
    MAX_STRETCH_SCORES,
    SUBLANES,
    KernelConfig,
)
from jax_kernels.ragged_paged_attention.kernel import (
    masking,
    online_softmax,
    tile_io,
)
from jax_kernels.ragged_paged_attention.kernel.block_loads import (
    largest_divisor,
)
from jax_kernels.ragged_paged_attention.kernel.decode import new_tokens
from jax_kernels.ragged_paged_attention.kernel.decode.blocks import CellBlock
from jax_kernels.ragged_paged_attention.kernel.decode.buffers import (
    DecodeContext,
    kv_of_slot,
    row_factors,
)
from jax_kernels.ragged_paged_attention.kernel.decode.fetch import Progress, Shadow
from jax_kernels.ragged_paged_attention.kernel.decode.steps import DecodeCell, Step
from jax_kernels.ragged_paged_attention.kernel.lse_rows import LseRows
from jax_kernels.ragged_paged_attention.kernel.online_softmax import SoftmaxState
from jax_kernels.ragged_paged_attention.kernel.schedule import Int, Schedule, log2
from jax_kernels.ragged_paged_attention.layout import LANES, align_to, dtype_packing

# Key heads in one round; even, since two bf16 heads share a word.
MAX_ROUND_HEADS = 8
# The smallest stretch, in tokens of a cell; each further one is twice as long.
MIN_STRETCH_TOKENS = 256
# Scores that wait for their softmax while the matrix units compute the next ones.
SCORE_REGISTERS = 32
# In cells of a window fewer: more of them would be spilled.
WINDOW_SCORE_REGISTERS = 16
MIN_CELLS_AHEAD = 2


def lay_out_sinks(context: DecodeContext) -> None:
    """Lays out the sinks once per launch, as the maxima that rows start from."""
    config, sinks = context.config, context.buffers.sinks
    if sinks is None:
        return
    sinks[...] = jnp.zeros(sinks.shape, jnp.float32)
    heads_per_tile = config.group * config.heads_per_softmax_tile(context.phase)
    num_rows = context.phase.block_q
    for query_head in range(config.num_q_heads):
        softmax_tile, member = divmod(query_head, heads_per_tile)
        logit = online_softmax.sink_logit(context.inputs.sinks[query_head])
        rows = pl.ds(member * num_rows, num_rows)
        sinks[softmax_tile, rows, :] = jnp.full((num_rows, sinks.shape[-1]), logit)


def lay_out_factors(context: DecodeContext) -> None:
    """Lays out the factors of key heads once per launch, as those of query rows."""
    config, factors = context.config, context.buffers.row_factors
    if factors is None:
        return
    heads_per_tile = config.heads_per_softmax_tile(context.phase)
    num_rows = config.group * context.phase.block_q
    for index, name in enumerate(row_factors(config)):
        # Rows of nobody are multiplied, too.
        factors[index] = jnp.ones(factors.shape[1:], jnp.float32)
        for head in range(config.num_kv_heads):
            softmax_tile, member = divmod(head, heads_per_tile)
            factor = context.head_factors.load(name, head)
            rows = pl.ds(member * num_rows, num_rows)
            factors[index, softmax_tile, rows, :] = jnp.full((num_rows, LANES), factor)


def attend(
    context: DecodeContext,
    step: Step,
    slot: Int,
    shadow: Shadow,
) -> Progress:
    """Attends the queries of the step in a slot, and plans a later one on the way.

    Returns:
      The result of ``shadow.plan``.
    """
    sizes = _stretch_sizes(context.schedule)
    index = sum((step.extent > size).astype(jnp.int32) for size in sizes[:-1])
    stretches = [
        functools.partial(_compute_stretch, context, step, slot, shadow, size)
        for size in sizes
    ]
    return lax.switch(index + jnp.int32(0), stretches)


def _stretch_sizes(schedule: Schedule) -> list[int]:
    """Tokens of a cell that each stretch computes, ascending."""
    phase, window = schedule.phase, schedule.config.spec.sliding_window
    most = phase.block_kv
    if window is not None:
        seen = window + phase.block_q - 1 + schedule.anchor_step - 1
        most = min(most, align_to(seen, MIN_STRETCH_TOKENS))
    sizes = [min(MIN_STRETCH_TOKENS, most)]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return sizes


def _compute_stretch(
    context: DecodeContext, step: Step, slot: Int, shadow: Shadow, size: int
):
    """All cells of a step, ``size`` tokens each."""
    if size < context.phase.block_kv // 2:
        # Too little vector work for the code of all pages.
        shadow = shadow.start_all_pages()
    tiles_per_round = _softmax_tiles_per_round(context, size)
    heads_per_tile = context.config.heads_per_softmax_tile(context.phase)
    num_softmax_tiles = context.config.num_kv_heads // heads_per_tile
    num_rounds = num_softmax_tiles // tiles_per_round

    def run_round(index: Int, shadow):
        first = index * tiles_per_round
        softmax_tiles = [first + i for i in range(tiles_per_round)]
        return _attend_round(context, step, slot, softmax_tiles, size, shadow)

    if num_rounds > 1:
        lax.fori_loop(0, num_rounds - 1, lambda i, _: run_round(i, None), None)
    return run_round(num_rounds - 1, shadow)


def _softmax_tiles_per_round(context: DecodeContext, size: int) -> int:
    """Softmax tiles that are computed together: the most that share no word rows."""
    config, phase = context.config, context.phase
    scores = phase.cells_per_step * config.query_rows(phase) * size
    heads = config.heads_per_softmax_tile(context.phase)
    num_softmax_tiles = config.num_kv_heads // heads
    packing = max(dtype_packing(config.q_dtype), dtype_packing(config.out_dtype))
    if heads % packing == 0 or config.num_kv_heads % packing:
        # Either a softmax tile has whole words, or key heads have words of their own.
        packing = 1
    most = min(MAX_ROUND_HEADS // heads, MAX_STRETCH_SCORES // scores)
    return packing * largest_divisor(
        num_softmax_tiles // packing, max(most // packing, 1)
    )


def _attend_round(
    context: DecodeContext,
    step: Step,
    slot: Int,
    softmax_tiles: Sequence[Int],
    size: int,
    shadow: Shadow | None,
):
    """Some softmax tiles of all cells.

    The source order is the pipeline: the scores of the next cell are computed before
    the softmax and the values of the present one, so that the matrix units and the
    vector units have work at the same time. Of one cell, all scores come first, then
    all softmaxes: one after the other, the matrix units would wait for every softmax.
    """
    config, buffers = context.config, context.buffers
    phase = context.phase
    works = [
        _CellWork.make(context, step, slot, i, size) for i in range(len(step.cells))
    ]
    states: list[SoftmaxState] | None = None
    if buffers.state is not None:
        states = [
            SoftmaxState(*(array[softmax_tile] for array in buffers.state))
            for softmax_tile in softmax_tiles
        ]
    registers_per_cell = pl.cdiv(
        len(softmax_tiles) * config.query_rows(phase) * size, SUBLANES * LANES
    )
    registers = SCORE_REGISTERS
    if context.schedule.cell_is_window:
        registers = WINDOW_SCORE_REGISTERS
    ahead = max(registers // registers_per_cell, MIN_CELLS_AHEAD)
    ahead = min(ahead, len(works))
    scores = [work.scores(softmax_tiles) for work in works[:ahead]]
    # Scalar work is issued beside vector work, so it is cheapest next to most of it.
    progress = None if shadow is None else shadow.plan()
    for index, work in enumerate(works):
        if index + ahead < len(works):
            scores.append(works[index + ahead].scores(softmax_tiles))
        states = work.attend(softmax_tiles, states, scores[index])
        if shadow is not None:
            shadow.start_pages(index, states[0].m)
        work.store_output(softmax_tiles, states)
    for work in works:
        work.block.restore()
    if buffers.state is not None and states is not None:
        for softmax_tile, state in zip(softmax_tiles, states, strict=True):
            for array, value in zip(buffers.state, state, strict=True):
                array[softmax_tile] = value
    return progress


class _HeadGroup(NamedTuple):
    """Key heads whose keys meet the same queries in one product.

    Both count from the first of the round.
    """

    heads: range
    tiles: range  # the softmax tiles that the heads are of
    tile_rows: int  # query rows of each

    def rows_of(self, array: jax.Array, tile: int) -> jax.Array:
        """The rows of one of the softmax tiles."""
        first = (tile - self.tiles.start) * self.tile_rows
        return array[first : first + self.tile_rows]


def _stacked(arrays: Sequence[jax.Array]) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


@dataclasses.dataclass(frozen=True)
class _CellWork:
    """The vector work of one cell of a stretch.

    Attributes:
      context: Gives buffers and geometry.
      cell: The cell.
      first_token: First token of the step, in the flat arrays.
      slot: Slot of the step.
      num_before: i32[query rows, 128], that of the cell in all lanes, or None.
      mask: bool[1 or query rows, size], the tokens that a query sees.
      block: Its keys and values.
    """

    context: DecodeContext
    cell: DecodeCell
    first_token: Int
    slot: Int
    num_before: jax.Array | None
    mask: jax.Array
    block: CellBlock

    @classmethod
    def make(
        cls,
        context: DecodeContext,
        step: Step,
        slot: Int,
        index: int,
        size: int,
    ) -> "_CellWork":
        config, cell, schedule = context.config, step.cells[index], context.schedule
        num_before = None
        if cell.num_before is not None:
            # Laid out now: later, the scalar unit is busy with the copies of pages.
            num_before = jnp.full(
                (config.query_rows(context.phase), LANES), cell.num_before
            )
        return cls(
            context,
            cell,
            step.first_token,
            slot,
            num_before=num_before,
            mask=_mask(context, cell, size),
            block=CellBlock(
                config,
                kv_of_slot(context, slot),
                first_row=index * schedule.cell_rows,
                num_rows=schedule.cell_rows,
                wraps=schedule.cell_is_window and size == context.phase.block_kv,
                size=size,
                visible_begin=cell.visible_begin,
                visible_end=_seen_end(context, cell),
                masks_words=cell.visible_begin is not None or context.phase.block_q > 1,
                is_alone=schedule.cell_is_window,
            ),
        )

    @property
    def config(self) -> KernelConfig:
        return self.context.config

    @property
    def heads_per_tile(self) -> int:
        """Key heads of a softmax tile."""
        return self.config.heads_per_softmax_tile(self.context.phase)

    @property
    def query_heads(self) -> int:
        """Query heads of a softmax tile in the arrays of queries and outputs."""
        return self.heads_per_tile * self.config.io_group

    def scores(self, softmax_tiles: Sequence[Int]) -> list[jax.Array]:
        """f32[query rows, size] of each, masked; merges the new token first."""
        config, per_word = self.config, self.config.new_heads_per_word
        packing = config.query_layout.packing
        first_head = softmax_tiles[0] * self.heads_per_tile
        scores, queries, by_head = [], [], []
        for group in self._groups(len(softmax_tiles)):
            for offset in range(len(queries), group.tiles.stop):
                parity = offset * self.query_heads % packing
                query = self._load_query(softmax_tiles[offset], parity)
                queries.append(self._multiplied("query", query, softmax_tiles[offset]))
            for head_offset in group.heads:
                if self._merges and head_offset % per_word == 0:
                    # Just before its head, so that the matrix units start at once.
                    self._merge(
                        (first_head >> log2(per_word)) + head_offset // per_word
                    )
                self.block.clear_end(first_head + head_offset)
            x = _stacked([queries[offset] for offset in group.tiles])
            products = self.block.products(x, [first_head + h for h in group.heads])
            by_head += [
                group.rows_of(array, head_offset // self.heads_per_tile)
                for head_offset, array in zip(group.heads, products, strict=True)
            ]
            if len(by_head) % self.heads_per_tile:
                continue
            for offset in group.tiles:
                own = self._own_rows([by_head[h] for h in self._head_offsets(offset)])
                own = self._multiplied("score", own, softmax_tiles[offset])
                s = online_softmax.finish_scores(own, config.numerics)
                scores.append(jnp.where(self.mask, s, online_softmax.MASKED_SCORE))
        return scores

    def attend(
        self,
        softmax_tiles: Sequence[Int],
        states: Sequence[SoftmaxState] | None,
        scores: Sequence[jax.Array],
    ) -> list[SoftmaxState]:
        """The states of the softmax tiles with this cell's keys and values added."""
        probabilities, starts = [], []
        for index, (softmax_tile, s) in enumerate(
            zip(softmax_tiles, scores, strict=True)
        ):
            before = None if states is None else states[index]
            start = self._start_state(softmax_tile, before)
            p, m, correction = online_softmax.probabilities(s, start.m)
            probabilities.append(p)
            starts.append((start._replace(m=m), correction))
        first_head = softmax_tiles[0] * self.heads_per_tile
        results, parts = [], [[] for _ in softmax_tiles]
        for group in self._groups(len(softmax_tiles)):
            weights = _stacked(
                [self._weights(probabilities[i], i, group) for i in group.tiles]
            )
            weighted = self.block.weighted_values(
                weights, [first_head + h for h in group.heads]
            )
            for offset in group.tiles:
                parts[offset].append(group.rows_of(weighted, offset))
            if group.heads.stop % self.heads_per_tile:
                continue
            for offset in group.tiles:
                own, (start, correction) = (
                    self._own_parts(parts[offset]),
                    starts[offset],
                )
                results.append(
                    self._add_block(start, correction, probabilities[offset], own)
                )
        return results

    def store_output(
        self, softmax_tiles: Sequence[Int], states: Sequence[SoftmaxState]
    ) -> None:
        """Normalises, and lays the heads out as the output array has them.

        Only the output after the last block of a sequence is sent. The others are
        overwritten or, where there is no query, in a place that is never sent.
        """
        config, rings = self.config, self.context.rings
        num_tokens = self.context.phase.block_q
        if config.spec.return_lse:
            self._store_lse(softmax_tiles, states)
        layout = config.out_layout
        packing = layout.packing
        ring = rings.out.at[self.slot]
        outs = []
        for softmax_tile, state in zip(softmax_tiles, states, strict=True):
            out = online_softmax.normalise(state, config.numerics.output_scale)
            out = self._multiplied("output", out, softmax_tile)
            if not self.block.is_alone:
                out = self.block.added_halves(out)
            outs.append(out[:, : config.io_lanes])
        query_heads = self.query_heads
        if num_tokens == 1 and query_heads % packing == 0:
            token = tile_io.TokenWords(
                ring.at[self.cell.query], layout, config.interpret
            )
            words_per_tile = query_heads // packing
            for softmax_tile, out in zip(softmax_tiles, outs, strict=True):
                words = tile_io.pack_rows(out, packing)[:words_per_tile]
                first = softmax_tile * words_per_tile
                token.store_words(words, first, words_per_tile)
            return
        tokens = tile_io.TokenWords(ring, layout, config.interpret)
        # The heads of a word row are in different registers.
        members = [
            out[head * num_tokens : (head + 1) * num_tokens]
            for out in outs
            for head in map(self._member, range(query_heads))
        ]
        first = (softmax_tiles[0] * query_heads) >> log2(packing)
        for index in range(len(members) // packing):
            pair = members[index * packing : (index + 1) * packing]
            words = tile_io.pack_heads(pair, config.interpret)
            tokens.store(words, first + index, self.cell.query)

    def _store_lse(
        self, softmax_tiles: Sequence[Int], states: Sequence[SoftmaxState]
    ) -> None:
        """Stores the logarithms of sums, whose heads have none that is nothing."""
        config, num_tokens = self.config, self.context.phase.block_q
        rows = LseRows(self.context.rings.lse.at[self.slot], config)
        num_heads = self.heads_per_tile * config.group
        for softmax_tile, state in zip(softmax_tiles, states, strict=True):
            lse = online_softmax.log_sums(state, config.numerics)
            first_head = softmax_tile * num_heads
            if num_tokens == 1:
                rows.store_column(lse, num_heads, first_head, self.cell.query)
                continue
            by_head = {
                head: lse[head * num_tokens : (head + 1) * num_tokens]
                for head in range(num_heads)
            }
            rows.store_heads(by_head, first_head, self.cell.query)

    def _multiplied(self, name: str, x: jax.Array, softmax_tile: Int) -> jax.Array:
        """[query rows, any] by a factor of the key heads of the rows, if there is one.

        One of ``buffers.ROW_FACTORS``.
        """
        names = row_factors(self.config)
        if name not in names:
            return x
        factors = self.context.buffers.row_factors[names.index(name), softmax_tile]
        return x * online_softmax.across(factors, x.shape[1])

    def _member(self, query_head: int) -> int:
        """Which rows of a softmax tile a head of the output gets.

        A head that is nothing gets what its neighbour has.
        """
        head, member = divmod(query_head, self.config.io_group)
        group = self.config.group
        return head * group + min(member, group - 1)

    def _groups(self, num_tiles: int) -> list["_HeadGroup"]:
        """The key heads of some softmax tiles, by product."""
        per_tile = self.heads_per_tile
        num_heads = num_tiles * per_tile
        # Both are powers of two: heads of one softmax tile, or of whole ones.
        size = math.gcd(self.block.heads_per_product, num_heads)
        return [
            _HeadGroup(
                heads=range(first, first + size),
                tiles=range(first // per_tile, pl.cdiv(first + size, per_tile)),
                tile_rows=self.config.query_rows(self.context.phase),
            )
            for first in range(0, num_heads, size)
        ]

    def _weights(self, p: jax.Array, offset: int, group: "_HeadGroup") -> jax.Array:
        """The probabilities of a softmax tile for each head of a product.

        Rows have zeros for the heads of others.
        """
        if len(group.heads) == 1:
            return p
        own_heads = self._head_offsets(offset)
        row = lax.broadcasted_iota(jnp.int32, (p.shape[0], 1), 0)
        num_rows = self.config.group * self.context.phase.block_q
        weights = []
        for head_offset in group.heads:
            place = row - (head_offset - own_heads.start) * num_rows
            if head_offset not in own_heads:
                weights.append(jnp.zeros_like(p))
            elif len(own_heads) == 1:
                weights.append(p)
            else:
                is_own = (place >= 0) & (place < num_rows)
                weights.append(jnp.where(is_own, p, 0.0))
        return jnp.concatenate(weights, axis=1)

    def _own_parts(self, parts: Sequence[jax.Array]) -> jax.Array:
        """The weighted values of a softmax tile, from those of each product."""
        if len(parts) == self.heads_per_tile:
            return self._own_rows(parts)
        return functools.reduce(jnp.add, parts)

    def _head_offsets(self, offset: int) -> range:
        """The key heads of a softmax tile, counted from the first one of the round."""
        first = offset * self.heads_per_tile
        return range(first, first + self.heads_per_tile)

    def _own_rows(self, by_head: Sequence[jax.Array]) -> jax.Array:
        """Takes from each key head's array the rows of its own query heads."""
        own = by_head[0]
        row = lax.broadcasted_iota(jnp.int32, (own.shape[0], 1), 0)
        for index, array in enumerate(by_head[1:], start=1):
            first = index * self.config.group * self.context.phase.block_q
            own = jnp.where(row >= first, array, own)
        return own

    def _start_state(
        self, softmax_tile: Int, state: SoftmaxState | None
    ) -> SoftmaxState:
        """The state so far or, in the first block of a sequence, that without keys."""
        sinks, config = self.context.buffers.sinks, self.config
        # A sink counts as one key with its logit and a zero value.
        start_m = online_softmax.NO_KEY_MAX if sinks is None else sinks[softmax_tile]
        start_l = 0.0 if sinks is None else 1.0
        if state is None or self.num_before is None:
            num_rows = config.query_rows(self.context.phase)
            start = (
                jnp.broadcast_to(jnp.float32(value), (num_rows, width))
                for value, width in (
                    (start_m, LANES),
                    (start_l, LANES),
                    (0.0, config.lanes),
                )
            )
            return SoftmaxState(*start)
        is_first = self.num_before == 0
        is_first_lanes = online_softmax.across(self.num_before, state.acc.shape[1]) == 0
        return SoftmaxState(
            m=jnp.where(is_first, start_m, state.m),
            l=jnp.where(is_first, start_l, state.l),
            acc=jnp.where(is_first_lanes, 0.0, state.acc),
        )

    def _add_block(
        self,
        state: SoftmaxState,
        correction: jax.Array,
        p: jax.Array,
        weighted_values: jax.Array,
    ) -> SoftmaxState:
        """``online_softmax.add_block``, without what is known of an only block."""
        block = self.block
        if block.gives_sums:
            row_sum = weighted_values
        else:
            row_sum = jnp.sum(p, axis=1, keepdims=True)
        if not block.is_alone:
            return online_softmax.add_block(state, correction, row_sum, weighted_values)
        if self.config.spec.has_sinks:
            row_sum += correction
        return SoftmaxState(
            state.m,
            jnp.broadcast_to(row_sum, state.m.shape),
            block.added_halves(weighted_values),
        )

    @property
    def _merges(self) -> bool:
        """Whether the stretch merges the new token: the only one, if there is one."""
        return self.context.updates and self.context.phase.block_q == 1

    def _merge(self, group: Int) -> None:
        new_tokens.merge(
            self.context, self.cell, self.slot, self.first_token, group, self.block
        )

    def _load_query(self, softmax_tile: Int, parity: int) -> jax.Array:
        """f32[query rows, lanes] of one softmax tile.

        The rows past those of the tile belong to other heads or to nobody. Rows never
        mix, so they are computed and ignored.

        Args:
          softmax_tile: Number of the softmax tile.
          parity: Where its first row sits in its word row, known at compile time.
        """
        config = self.config
        layout = config.query_layout
        packing = layout.packing
        num_rows = config.query_rows(self.context.phase)
        if self.context.phase.block_q > 1:
            return self._load_queries(softmax_tile, parity)
        source = self.context.rings.queries.at[self.slot, self.cell.query]
        token = tile_io.TokenWords(source, layout, config.interpret)
        first = (softmax_tile * self.query_heads) >> log2(packing)
        words, odd_head = divmod(self.query_heads, packing)
        multiple = 1 if odd_head else words
        if packing == 1:
            words = token.load_words(first, num_rows, multiple)
            x = pltpu.bitcast(words, jnp.float32)
        else:
            size = num_rows // packing + (SUBLANES if parity else 0)
            words = token.load_words(first, size, multiple)
            x = pltpu.bitcast(words, jnp.bfloat16).astype(jnp.float32)
            x = x[parity : parity + num_rows]
        return tile_io.widen(x, config.lanes)

    def _load_queries(self, softmax_tile: Int, parity: int) -> jax.Array:
        """``_load_query`` for several tokens: head by head, the rows of all tokens."""
        config, phase = self.config, self.context.phase
        layout = config.query_layout
        packing = layout.packing
        source = self.context.rings.queries.at[self.slot]
        tokens = tile_io.TokenWords(source, layout, config.interpret)
        query_heads = self.heads_per_tile * config.group
        first = (softmax_tile * self.query_heads) >> log2(packing)
        heads = []
        for index in range(pl.cdiv(parity + query_heads, packing)):
            words = tokens.load(first + index, self.cell.query, phase.block_q)
            heads += tile_io.unpack_heads(words, packing)
        heads = heads[parity : parity + query_heads]
        num_padding = config.query_rows(phase) - query_heads * phase.block_q
        if num_padding:
            heads.append(jnp.zeros((num_padding, config.io_lanes), jnp.float32))
        x = jnp.concatenate(heads)
        return tile_io.widen(x, config.lanes)


def _mask(context: DecodeContext, cell: DecodeCell, size: int) -> jax.Array:
    """bool[1 or query rows, size]: the tokens of a block that a query sees."""
    spec, num_tokens = context.config.spec, context.phase.block_q
    if num_tokens == 1:
        seen_end = _seen_end(context, cell)
        return masking.decode_mask(cell.visible_begin, seen_end, size)
    num_rows = context.config.query_rows(context.phase)
    row = lax.broadcasted_iota(jnp.int32, (num_rows, 1), 0)
    first_query = _new_start(context, cell)
    token = row & (num_tokens - 1)
    query_ends = None
    if cell.place_in_causal_block is not None:
        first_place = cell.place_in_causal_block
        query_ends = spec.seen_end(first_place + token + 1) + (
            first_query - first_place
        )
    return masking.attention_mask(
        first_query + token,
        lax.broadcasted_iota(jnp.int32, (1, size), 1),
        _seen_end(context, cell),
        first_query,
        spec,
        query_ends,
    )


def _seen_end(context: DecodeContext, cell: DecodeCell) -> Int:
    """The token after the last that a query sees; new ones may be behind it."""
    is_cache = context.config.spec.attend == "cache"
    return _new_start(context, cell) if is_cache else cell.visible_end


def _new_start(context: DecodeContext, cell: DecodeCell) -> Int:
    """Where the new tokens are, counted from the block as all of its tokens."""
    if context.config.spec.needs_no_new_tokens:
        return cell.visible_end
    return cell.visible_end - (1 if cell.num_queries is None else cell.num_queries)

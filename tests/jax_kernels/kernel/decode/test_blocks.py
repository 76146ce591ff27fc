"""Products with the keys and values of a cell, where dead tokens hold NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_kernels import chips
from jax_kernels.ragged_paged_attention import layout
from jax_kernels.ragged_paged_attention.config import AttentionSpec, KernelConfig
from jax_kernels.ragged_paged_attention.kernel import tile_io
from jax_kernels.ragged_paged_attention.kernel.decode.blocks import CellBlock
from jax_kernels.ragged_paged_attention.layout import CacheLayout
from jax_kernels.ragged_paged_attention.numerics import LOG2_E

# The cell begins within the rows of its step.
NUM_HEADS, NUM_ROWS, FIRST_TOKEN, STEP_TOKENS = 2, 8, 64, 256
# Few columns, so that short cells are of paired rows, and in several products.
CHIP = dataclasses.replace(chips.UNKNOWN, matrix_columns=32)
CHUNKS = {"float32": 8, "bfloat16": 16, "float8_e4m3fn": 32, "int8": 32}


class ArrayRef:
    """Stands in for a Pallas reference: ``at`` is a view of some heads."""

    def __init__(self, value, parent=None, index=None):
        self.value, self.parent, self.index = jnp.asarray(value), parent, index
        self.shape, self.dtype = self.value.shape, self.value.dtype

    @property
    def at(self):
        return _Views(self)

    def __getitem__(self, index):
        value = self.value if self.parent is None else self.parent[self.index]
        return value[index]

    def __setitem__(self, index, value):
        if self.parent is None:
            self.value = self.value.at[index].set(value)
        else:
            self.parent[self.index] = value


class _Views:
    def __init__(self, ref):
        self.ref = ref

    def __getitem__(self, index):
        return ArrayRef(self.ref[index], self.ref, index)


def make_config(dtype: str, head_dim: int, **options) -> KernelConfig:
    # Scores are in units of log2.
    spec = AttentionSpec(sm_scale=1.0 / LOG2_E, **options)
    f32 = jnp.dtype(jnp.float32)
    return KernelConfig(
        spec=spec,
        cache=CacheLayout(1, STEP_TOKENS, NUM_HEADS, head_dim, dtype),
        phases=(),
        num_tokens=1,
        pages_per_sequence=1,
        num_q_heads=NUM_HEADS,
        q_dtype=f32,
        out_dtype=f32,
        chip=CHIP,
        interpret=True,
    )


def make_pages(dtype: str, head_dim: int, num_tokens: int) -> np.ndarray:
    """[1, 2, heads, tokens, head_dim]: small whole numbers, exact in every dtype."""
    shape = (1, 2, NUM_HEADS, num_tokens, head_dim)
    return np.random.default_rng(0).integers(-3, 4, shape).astype(dtype)


def poisoned(pages: np.ndarray, begin: int, end: int) -> np.ndarray:
    """The same with NaN, or the largest number there is, outside of a range."""
    bad = 127 if pages.dtype == np.int8 else np.nan
    result = pages.copy()
    result[..., :begin, :] = result[..., end:, :] = bad
    return result


def cell_of(
    ref, config: KernelConfig, size: int, begin, end, *, is_window: bool = False
) -> CellBlock:
    """A cell; as a window's only one it may end behind ``size``."""
    packing = config.cache.packing
    extra = config.rows_per_chunk if is_window else 0
    return CellBlock(
        config,
        ref,
        first_row=FIRST_TOKEN // packing,
        num_rows=size // packing + extra,
        wraps=is_window,
        size=size,
        visible_begin=begin,
        visible_end=end,
        masks_words=config.spec.sliding_window is not None and not is_window,
        is_alone=is_window,
    )


def ranges_of(size: int, chunk: int) -> list[tuple[int, int]]:
    """Visible ranges with an edge at every place of a chunk, and at all else."""
    ends = [(0, end) for end in (*range(1, chunk + 1), size // 2, size // 2 + 1, size)]
    begins = [(size - place, size) for place in range(1, chunk)]
    return [*ends, *begins, (size // 2 - 1, size // 2 + 1)]


@pytest.mark.parametrize("windowed", [False, True], ids=["no_window", "window"])
@pytest.mark.parametrize("num_tokens", [32, 64, 128])
@pytest.mark.parametrize("head_dim", [40, 128])
@pytest.mark.parametrize("dtype", CHUNKS)
def test_nothing_dead_meets_what_is_seen(dtype, head_dim, num_tokens, windowed):
    chunk, size = CHUNKS[dtype], num_tokens
    window = chunk if windowed else None
    config = make_config(dtype, head_dim, update_kv_cache=False, sliding_window=window)
    pages = make_pages(dtype, head_dim, STEP_TOKENS)
    rng = np.random.default_rng(1)
    queries = rng.integers(-3, 4, (NUM_HEADS, NUM_ROWS, head_dim)).astype(np.float32)
    weights = rng.integers(0, 4, (NUM_HEADS, NUM_ROWS, size)).astype(np.float32)

    @jax.jit
    def run(cache, p, begin, end):
        cell = cell_of(ArrayRef(cache), config, size, begin, end)
        x = jnp.pad(queries, [(0, 0), (0, 0), (0, config.lanes - head_dim)])
        scores, values = [], []
        for head in range(NUM_HEADS):
            cell.clear_end(head)
            scores += cell.products(x[head], [head])
            weighted = cell.weighted_values(p[head], [head])
            values.append(cell.added_halves(weighted)[:, :head_dim])
        return jnp.stack(scores), jnp.stack(values)

    tokens = slice(FIRST_TOKEN, FIRST_TOKEN + size)
    keys, values = pages[0, :, :, tokens].astype(np.float32)
    expected_scores = queries @ keys.transpose(0, 2, 1)
    for begin, end in ranges_of(size, chunk):
        if begin and not windowed:
            continue
        # A window is fetched by whole rows.
        first = begin & -config.cache.packing
        bad = poisoned(pages, FIRST_TOKEN + first, FIRST_TOKEN + end)
        cache = np.asarray(layout.pack_kv_cache(bad))[0]
        p = np.where((np.arange(size) >= begin) & (np.arange(size) < end), weights, 0)
        scores, sums = run(cache, p, begin, end)
        seen = slice(begin, end)
        np.testing.assert_allclose(
            scores[:, :, seen], expected_scores[:, :, seen], rtol=1e-6, atol=1e-4
        )
        np.testing.assert_array_equal(sums, p[:, :, seen] @ values[:, seen])


@pytest.mark.parametrize("window", [None, 1], ids=["no_window", "window_of_1"])
@pytest.mark.parametrize("head_dim", [40, 128])
@pytest.mark.parametrize("dtype", CHUNKS)
def test_dead_tokens_are_put_back_as_they_were(dtype, head_dim, window):
    chunk = CHUNKS[dtype]
    size = 128
    config = make_config(dtype, head_dim, sliding_window=window)
    num_parts = 1 if config.cache.is_fused_kv else 2
    pages = make_pages(dtype, head_dim, STEP_TOKENS)
    new = np.asarray(layout.pack_kv_cache(make_pages(dtype, head_dim, chunk) + 1))[0]

    @jax.jit
    def run(cache, place):
        ref = ArrayRef(cache)
        cell = cell_of(ref, config, size, place if window else 0, place + 1)
        row = (place % chunk) // config.cache.packing
        is_row = jnp.arange(config.rows_per_chunk)[:, None] == row
        is_new = jnp.where(is_row, jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
        for part in range(num_parts):
            rows = tile_io.WordRows(ArrayRef(new[part * NUM_HEADS]), interpret=True)
            words = rows.load(0, config.rows_per_chunk)
            cell.merge([(1, part, words)], place // chunk, is_new)
        cell.clear_end(1)
        cell.products(jnp.ones((NUM_ROWS, config.lanes)), [1])
        sums = cell.weighted_values(jnp.ones((NUM_ROWS, size)), [1])
        cell.restore()
        return sums, ref.value

    for place in range(62, 66):
        bad = poisoned(pages, FIRST_TOKEN, FIRST_TOKEN + place)
        cache = np.asarray(layout.pack_kv_cache(bad))[0]
        sums, after = run(cache, place)
        assert np.isfinite(np.asarray(sums)).all()
        packing = config.cache.packing
        expected = cache.copy()
        for part in range(num_parts):
            row = (FIRST_TOKEN + place) // packing
            source = new[part * NUM_HEADS, (place % chunk) // packing]
            expected[part * NUM_HEADS + 1, row] = source
        np.testing.assert_array_equal(
            np.asarray(after).view(np.uint8), expected.view(np.uint8)
        )


@pytest.mark.parametrize("head_dim", [40, 128])
@pytest.mark.parametrize("dtype", CHUNKS)
def test_a_window_may_end_behind_its_block(dtype, head_dim):
    """Its last tokens take the places of those before the first, of any two heads.

    Both heads are in one product, which has twice as many columns as there are tokens.
    """
    size, chip = 128, dataclasses.replace(CHIP, matrix_columns=256)
    config = make_config(dtype, head_dim, sliding_window=size, update_kv_cache=False)
    config = dataclasses.replace(config, chip=chip)
    packing = config.cache.packing
    rng = np.random.default_rng(1)
    pages = make_pages(dtype, head_dim, STEP_TOKENS)
    queries = rng.integers(-2, 3, (NUM_HEADS, NUM_ROWS, head_dim)).astype(np.float32)
    weights = rng.integers(0, 3, (NUM_HEADS, NUM_ROWS, size)).astype(np.float32)

    @jax.jit
    def run(cache, end):
        cell = cell_of(ArrayRef(cache), config, size, None, end, is_window=True)
        x = jnp.pad(queries, [(0, 0), (0, 0), (0, config.lanes - head_dim)])
        assert cell.heads_per_product == NUM_HEADS
        for head in range(NUM_HEADS):
            cell.clear_end(head)
        products = cell.products(jnp.concatenate(list(x)), range(NUM_HEADS))
        scores = [products[i][i * NUM_ROWS :][:NUM_ROWS] for i in range(NUM_HEADS)]
        zeros = jnp.zeros((NUM_ROWS, size))
        p = jnp.concatenate(
            [
                jnp.concatenate([weights[0], zeros], axis=1),
                jnp.concatenate([zeros, weights[1]], axis=1),
            ]
        )
        weighted = cell.weighted_values(p, range(NUM_HEADS))
        values = cell.added_halves(weighted)[:, :head_dim]
        sums = weighted[:, 0] if cell.gives_sums else p.sum(axis=1)
        return jnp.stack(scores), values.reshape(NUM_HEADS, NUM_ROWS, -1), sums

    for behind in range(packing):
        begin, end = FIRST_TOKEN + behind, FIRST_TOKEN + size + behind
        cache = np.asarray(layout.pack_kv_cache(poisoned(pages, begin, end)))[0]
        scores, values, sums = run(cache, size + behind)
        # The tokens in the order of their places.
        order = [*range(FIRST_TOKEN + size, end), *range(begin, FIRST_TOKEN + size)]
        keys, seen = pages[0, :, :, order].astype(np.float32).transpose(1, 2, 0, 3)
        np.testing.assert_allclose(
            scores, queries @ keys.transpose(0, 2, 1), rtol=1e-6, atol=1e-4
        )
        np.testing.assert_array_equal(values, weights @ seen)
        np.testing.assert_array_equal(sums, weights.sum(axis=2).reshape(-1))

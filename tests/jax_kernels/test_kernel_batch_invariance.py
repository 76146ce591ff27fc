"""With ``batch_invariant`` a token's output is the same bits in any batch.

One text is served at once, alone, and then cut into steps beside neighbours, among
mixed sequences and as a decode, with other numbers of tokens, sequences and pages.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jax_kernels.ragged_paged_attention import BlockSizes, kv_cache_shape
from tests.support import cut_texts
from tests.support.cut_texts import Bucket, Step
from tests.support.interpret import run_kernel

# Each case compiles simulations of its own.
pytestmark = pytest.mark.slow

SMALL_BLOCKS = BlockSizes(32, 32, 32)
LENGTH = 100
ALONE = [Step(LENGTH)], Bucket(LENGTH, 1, 7)
CUT = (
    [
        Step(33, before=[(3, 9), (5, 5)]),
        Step(1, is_decode=True, after=[(4, 90)]),
        Step(1),
        Step(65, before=[(1, 40)], after=[(7, 7)]),
    ],
    Bucket(150, 5, 11),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is served, and how."""

    heads: tuple[int, int] = (8, 2)
    head_dim: int = 64
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    blocks: BlockSizes | None = SMALL_BLOCKS
    sm_scale: float = 0.1
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def text(self, length: int) -> cut_texts.Text:
        num_q_heads, num_kv_heads = self.heads
        dtype = jnp.dtype(self.cache_dtype)

        def empty_cache(num_pages: int) -> np.ndarray:
            shape = kv_cache_shape(num_pages, 16, num_kv_heads, self.head_dim, dtype)
            return np.zeros(shape, dtype)

        return cut_texts.make_text(
            length,
            empty_cache,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=self.head_dim,
            page_size=16,
            dtype=jnp.dtype(self.dtype),
        )

    def run(self, arguments: tuple, **options) -> tuple[np.ndarray, ...]:
        arguments = tuple(x if x is None else jnp.asarray(x) for x in arguments)
        options = {"batch_invariant": True, **self.options, **options}
        return run_kernel(
            arguments, block_sizes=self.blocks, sm_scale=self.sm_scale, **options
        )


CASES = {
    "bfloat16": Case(options={"return_lse": True}),
    # Some rows leave the range of their anchor, and their neighbours do not.
    "recovered_rows_e4m3": Case(
        head_dim=128, cache_dtype="float8_e4m3fn", sm_scale=9.0, heads=(2, 2)
    ),
}
MORE_CASES = {
    "recovered_rows_d256": Case(heads=(8, 1), head_dim=256, sm_scale=4.0),
    "window": Case(options={"sliding_window": 40}),
    "window_f32": Case(
        dtype="float32", cache_dtype="float32", options={"sliding_window": 7}
    ),
    "f32": Case(dtype="float32", cache_dtype="float32", heads=(2, 1)),
    "quantised": Case(
        cache_dtype="int8",
        options={"q_scale": 0.02, "k_scale": 0.02, "v_scale": 0.02, "soft_cap": 9.0},
    ),
    # Whole blocks have as many sums as chunks.
    "blocks_of_chunks": Case(blocks=BlockSizes(32, 32, 512)),
    "default_blocks": Case(blocks=None, heads=(2, 2)),
}


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(CASES[name], id=name) for name in CASES),
        *(
            pytest.param(MORE_CASES[name], id=name, marks=pytest.mark.extended)
            for name in MORE_CASES
        ),
    ],
)
def test_a_text_gets_the_same_bits_alone_and_cut_in_steps(case):
    length = LENGTH
    alone, cut = ALONE, CUT
    if case.blocks is None or case.blocks.block_kv > 256:
        length = 700
        alone = [Step(length)], Bucket(length, 1, 44)
        cut = (
            [Step(270), Step(1, is_decode=True), Step(429, before=[(9, 300)])],
            Bucket(448, 3, 50),
        )
    text = case.text(length)
    expected = cut_texts.serve(text, *alone, case.run)
    actual = cut_texts.serve(text, *cut, case.run)
    for one, other in zip(actual, expected, strict=True):
        assert not cut_texts.differing_tokens(one, other)


def test_without_it_a_decode_has_other_bits():
    """Else the tests above would show nothing."""
    case = CASES["bfloat16"]
    run = functools.partial(case.run, batch_invariant=False)
    text = case.text(LENGTH)
    expected, _ = cut_texts.serve(text, *ALONE, run)
    actual, _ = cut_texts.serve(text, *CUT, run)
    assert 33 in cut_texts.differing_tokens(actual, expected)


@pytest.mark.extended
@pytest.mark.parametrize("seed", range(3))
def test_random_cuts_and_neighbours_change_no_bit(seed):
    case = CASES["bfloat16"]
    text, rng = case.text(LENGTH), np.random.default_rng(seed)
    bucket = CUT[1]
    expected = cut_texts.serve(text, *ALONE, case.run)
    steps = cut_texts.draw_steps(rng, LENGTH, bucket)
    actual = cut_texts.serve(text, steps, bucket, case.run, seed=seed)
    for one, other in zip(actual, expected, strict=True):
        assert not cut_texts.differing_tokens(one, other)

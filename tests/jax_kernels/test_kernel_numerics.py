"""The kernel against float64: every dtype, layout and option, and the whole cache.

Each case crosses tiles, blocks, pages and packed rows. The output is held to the error
budget of its data (support/numerics.py), the cache to every byte. Pages are permuted,
dead slots and padding hold NaN and infinity, and entries that must not be used hold
garbage (support/ragged_batches.py).
"""

import dataclasses
from typing import Any

import pytest

from jax_kernels.ragged_paged_attention import BlockSizes
from tests.conftest import HAS_TPU
from tests.support.interpret import SMALL_BLOCKS, assert_kernel_matches_oracle
from tests.support.ragged_batches import make_ragged_batch

# Each case compiles a simulation of its own.
pytestmark = pytest.mark.slow

# (q_len, kv_len): three decodes, a fresh prompt, and two that continue at odd places.
LENGTHS = ((1, 1), (1, 17), (1, 40), (5, 5), (20, 33), (40, 71))
BF16, F32 = "bfloat16", "float32"
E4M3, E5M2, INT8 = "float8_e4m3fn", "float8_e5m2", "int8"
# Scales that use most of the range of int8 for normal numbers.
INT8_SCALES = {"k_scale": 0.03, "v_scale": 0.025}


@dataclasses.dataclass(frozen=True)
class Case:
    """One compilation of the kernel. Fields are those of ``make_ragged_batch``."""

    heads: tuple[int, int] = (4, 2)  # Hq, Hkv
    head_dim: int = 128
    page_size: int = 16
    q_dtype: str = BF16
    cache_dtype: str = BF16
    with_sinks: bool = False
    lengths: tuple[tuple[int, int], ...] = LENGTHS
    blocks: BlockSizes = SMALL_BLOCKS
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self, **batch_options) -> None:
        """Runs the kernel and compares it with the oracle."""
        options = {"sm_scale": self.head_dim**-0.5} | self.options
        batch = make_ragged_batch(
            self.lengths,
            num_q_heads=self.heads[0],
            num_kv_heads=self.heads[1],
            head_dim=self.head_dim,
            page_size=self.page_size,
            q_dtype=self.q_dtype,
            cache_dtype=self.cache_dtype,
            with_sinks=self.with_sinks,
            cache_holds_new_tokens=not options.get("update_kv_cache", True),
            k_scale=options.get("k_scale"),
            v_scale=options.get("v_scale"),
            **batch_options,
        )
        assert_kernel_matches_oracle(batch, block_sizes=self.blocks, **options)


# Of these, other cases here have each part: they are left to a longer run.
COMBINED = {
    "batch_invariant_full",
    "batch_invariant_window",
    "carried_fused_scaled",
    "carried_wide",
    "carried_window",
    "chunk_not_a_power_of_two",
    "chunked_in_parts",
    "d256_gqa_24_to_4",
    "d320_int8_window",
    "d512_f32",
    "d512_mqa_8_to_1",
    "d64_gqa_30_to_10",
    "d64_gqa_6_to_2",
    "d64_mha_16_to_16",
    "d72_mqa_3_to_1",
    "d96_mha_7_to_7",
    "e5m2",
    "e5m2_queries",
    "full_float8",
    "fused_int8_queries",
    "fused_sinks",
    "long_fused_window_sinks",
    "many_cells",
    "many_cells_fused",
    "many_heads_in_rounds",
    "page_larger_than_block",
    "q_f32_cache_e4m3",
    "q_f32_cache_int8",
    "quantised_queries",
    "row_sums_by_vector_units",
    "soft_cap_e4m3",
    "wide_in_parts",
    "window_of_many",
    "window_paired",
    "window_split",
    "window_without_update",
}


def cases(**named: Case):
    def marks(name: str):
        return pytest.mark.extended if name in COMBINED else ()

    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=name, marks=marks(name))
            for name, case in named.items()
        ],
    )


@cases(
    q_bf16_cache_bf16=Case(),
    q_f32_cache_f32=Case(q_dtype=F32, cache_dtype=F32),
    q_bf16_cache_f32=Case(cache_dtype=F32, head_dim=64),
    q_f32_cache_bf16=Case(q_dtype=F32, head_dim=96, heads=(6, 2)),
    q_bf16_cache_e4m3=Case(
        cache_dtype=E4M3, options={"k_scale": 0.5, "v_scale": 2.0}, page_size=32
    ),
    q_f32_cache_e4m3=Case(q_dtype=F32, cache_dtype=E4M3, head_dim=64),
    q_bf16_cache_e5m2=Case(
        cache_dtype=E5M2, head_dim=64, options={"k_scale": 3.0, "v_scale": 0.3}
    ),
    q_bf16_cache_int8=Case(cache_dtype=INT8, options=INT8_SCALES, page_size=8),
    q_f32_cache_int8=Case(
        q_dtype=F32, cache_dtype=INT8, head_dim=64, options=INT8_SCALES
    ),
)
def test_every_dtype_stays_within_its_error_budget(case):
    case.check()


@cases(
    bf16_cache=Case(options={"k_scale": 0.5, "v_scale": 3.0}),
    e4m3_queries=Case(
        cache_dtype=E4M3, options={"q_scale": 0.01, "k_scale": 0.5}, with_sinks=True
    ),
    e5m2_queries=Case(
        cache_dtype=E5M2, head_dim=64, options={"q_scale": 2.0, "soft_cap": 3.0}
    ),
    int8_queries=Case(
        cache_dtype=INT8, options={"q_scale": 0.03, **INT8_SCALES}, head_dim=96
    ),
)
def test_scales_multiply_scores_and_output(case):
    case.check()


@cases(
    d32_mqa_8_to_1=Case(head_dim=32, heads=(8, 1), with_sinks=True),
    d40_mha_5_to_5=Case(
        head_dim=40, heads=(5, 5), cache_dtype=E4M3, page_size=64, with_sinks=True
    ),
    d64_gqa_6_to_2=Case(head_dim=64, heads=(6, 2), with_sinks=True),
    d72_mqa_3_to_1=Case(head_dim=72, heads=(3, 1), page_size=128, with_sinks=True),
    d64_gqa_30_to_10=Case(head_dim=64, heads=(30, 10), lengths=LENGTHS[1:4]),
    d64_mha_16_to_16=Case(head_dim=64, heads=(16, 16), lengths=LENGTHS[1:4]),
    d128_mqa_32_to_1_f32=Case(
        heads=(32, 1), q_dtype=F32, cache_dtype=INT8, lengths=LENGTHS[1:5]
    ),
    d128_gqa_6_to_3=Case(heads=(6, 3)),
    d256_mqa_2_to_1=Case(head_dim=256, heads=(2, 1), cache_dtype=E4M3),
    d96_mha_7_to_7=Case(head_dim=96, heads=(7, 7), with_sinks=True),
    d192=Case(head_dim=192, page_size=8),
    d512=Case(head_dim=512),
    d512_mqa_8_to_1=Case(head_dim=512, heads=(8, 1), cache_dtype=E4M3, with_sinks=True),
    d512_f32=Case(head_dim=512, heads=(2, 1), q_dtype=F32, cache_dtype=F32),
    d320_int8_window=Case(
        head_dim=320,
        heads=(6, 2),
        cache_dtype=INT8,
        options={"sliding_window": 18, **INT8_SCALES},
    ),
    d256_gqa_24_to_4=Case(head_dim=256, heads=(24, 4), page_size=256, with_sinks=True),
)
def test_every_head_layout_finds_its_heads_and_sinks(case):
    """Rule 11: sinks and everything per head are padded together with the group."""
    case.check()


@cases(
    full=Case(options={"causal": False}),
    window_of_1=Case(options={"sliding_window": 1}, head_dim=64),
    window_within_a_page=Case(
        options={"sliding_window": 5}, lengths=((1, 90), *LENGTHS)
    ),
    window_across_blocks=Case(
        options={"sliding_window": 37},
        lengths=((1, 130), (1, 96), *LENGTHS, (3, 150)),
        page_size=8,
    ),
    window_larger_than_all=Case(options={"sliding_window": 1000}, cache_dtype=E4M3),
    window_full=Case(options={"sliding_window": 20, "causal": False}),
    soft_cap=Case(options={"soft_cap": 0.7}),
    soft_cap_window_sinks=Case(
        options={"soft_cap": 5.0, "sliding_window": 18},
        with_sinks=True,
        head_dim=64,
        page_size=8,
    ),
    batch_invariant=Case(options={"batch_invariant": True}, with_sinks=True),
    batch_invariant_window=Case(
        options={"batch_invariant": True, "sliding_window": 37, "causal_block": 4},
        lengths=((1, 130), *LENGTHS, (3, 150)),
        cache_dtype=E4M3,
    ),
    batch_invariant_full=Case(
        options={"batch_invariant": True, "causal": False, "soft_cap": 5.0},
        q_dtype=F32,
        head_dim=64,
    ),
    out_f32=Case(options={"out_dtype": F32}),
    out_bf16=Case(q_dtype=F32, cache_dtype=F32, options={"out_dtype": BF16}),
)
def test_every_option_means_what_the_oracle_says(case):
    case.check()


# The code of decode exists in several lengths, and without masks for long contexts.
LONG_DECODES = tuple((1, kv_len) for kv_len in (60, 256, 257, 512, 513, 1025, 1300))


@cases(
    split=Case(lengths=LONG_DECODES, blocks=BlockSizes(512, 32, 32), page_size=64),
    long_fused_window_sinks=Case(
        lengths=LONG_DECODES,
        blocks=BlockSizes(512, 32, 32),
        page_size=64,
        head_dim=64,
        heads=(6, 2),
        cache_dtype=E4M3,
        with_sinks=True,
        options={"sliding_window": 700},
    ),
    fused_two_products=Case(
        lengths=((1, 1), (1, 511), (1, 514), (1, 1025), (1, 1300)),
        blocks=BlockSizes(1024, 32, 32),
        page_size=64,
        head_dim=40,
        heads=(8, 1),
    ),
    fused_int8_queries=Case(
        lengths=((1, 257), (1, 512), (1, 515)),
        blocks=BlockSizes(512, 32, 32),
        page_size=64,
        head_dim=64,
        cache_dtype=INT8,
        options={"q_scale": 0.03, **INT8_SCALES},
    ),
)
def test_decode_over_long_blocks(case):
    case.check()


# Steps of many small pages.
SHORT_DECODES = tuple((1, 1 + 37 * n % 190) for n in range(14))
SMALL_PAGES = BlockSizes(64, 32, 32)
# Steps of 16 cells: more of them than one of the two rings of blocks has slots.
MANY_DECODES = tuple((1, 1 + 37 * n % 700) for n in range(48)) + LONG_DECODES
MANY_PAGES = BlockSizes(256, 32, 32)


@cases(
    split=Case(lengths=SHORT_DECODES, blocks=SMALL_PAGES, page_size=8, heads=(4, 1)),
    fused_window_sinks=Case(
        lengths=SHORT_DECODES,
        blocks=SMALL_PAGES,
        page_size=8,
        head_dim=64,
        cache_dtype=E4M3,
        with_sinks=True,
        options={"sliding_window": 50},
    ),
    many_cells=Case(
        lengths=MANY_DECODES, blocks=MANY_PAGES, page_size=64, heads=(4, 1)
    ),
    many_cells_fused=Case(
        lengths=MANY_DECODES,
        blocks=MANY_PAGES,
        page_size=64,
        head_dim=64,
        cache_dtype=E4M3,
        with_sinks=True,
        options={"sliding_window": 300},
    ),
)
def test_pages_start_in_the_shadow_of_decode(case):
    """Blocks of many pages are in two rings, on chips that have room for them."""
    options = {"chip": "tpu7x"} | case.options
    dataclasses.replace(case, options=options).check()


# Around one and two pages, and around a window of 64 at each place of a packed row.
AROUND_A_WINDOW = tuple(
    (1, n) for n in (1, 16, 31, 63, 64, 65, 66, 67, 68, 95, 127, 128, 129, 131, 200)
)


@cases(
    window_fused=Case(
        lengths=AROUND_A_WINDOW,
        blocks=BlockSizes(128, 32, 32),
        page_size=128,
        head_dim=64,
        heads=(8, 4),
        with_sinks=True,
        options={"sliding_window": 128},
    ),
    window_split=Case(
        lengths=AROUND_A_WINDOW,
        blocks=SMALL_PAGES,
        heads=(8, 1),
        cache_dtype=E4M3,
        options={"sliding_window": 64, "k_scale": 0.5},
    ),
    window_without_update=Case(
        lengths=AROUND_A_WINDOW,
        blocks=SMALL_PAGES,
        page_size=32,
        head_dim=64,
        heads=(16, 2),
        cache_dtype=E4M3,
        options={"sliding_window": 64, "update_kv_cache": False},
    ),
    # Seven steps: more of them than both rings have slots.
    window_of_many=Case(
        lengths=tuple((1, 1 + 37 * n % 190) for n in range(112)),
        blocks=SMALL_PAGES,
        page_size=32,
        head_dim=64,
        heads=(2, 1),
        options={"sliding_window": 64},
    ),
    window_paired=Case(
        lengths=((1, 400), (1, 513), (1, 512), (1, 700)),
        blocks=BlockSizes(512, 32, 32),
        page_size=64,
        head_dim=64,
        heads=(8, 1),
        options={"sliding_window": 512},
    ),
)
def test_a_block_as_long_as_the_window_begins_with_it(case):
    options = {"chip": "tpu7x"} | case.options
    dataclasses.replace(case, options=options).check()


# A masked block is computed in part, by chunks: some of each number, and one past it.
PARTS_OF_1024 = ((20, 200), (3, 500), (40, 700), (33, 1000), (5, 1300))


@cases(
    parts=Case(lengths=PARTS_OF_1024, blocks=BlockSizes(128, 32, 1024), page_size=64),
    two_softmax_tiles=Case(
        lengths=((90, 300), (1, 70), (65, 65)),
        heads=(32, 2),
        head_dim=64,
        cache_dtype=E4M3,
        with_sinks=True,
        blocks=BlockSizes(128, 64, 512),
        page_size=64,
        options={"sliding_window": 100},
    ),
    groups_of_heads=Case(lengths=((40, 90), (7, 40)), heads=(12, 12), page_size=64),
)
def test_tiles_of_every_shape(case):
    case.check()


# Tiles of 64 queries in parts of 16, blocks of two chunks of 256 tokens. The last
# tiles have queries for one, two and three parts, of which the first ends within one.
IDLE_PARTS = ((70, 70), (25, 600), (105, 410), (1, 300), (64, 64))
# The first parts see nothing of the second chunk, or of the second block.
UNSEEN_CHUNKS = ((64, 300), (60, 284), (100, 560), (64, 257))


@cases(
    last_parts_have_no_query=Case(lengths=IDLE_PARTS, with_sinks=True),
    first_parts_see_no_key_of_a_chunk=Case(lengths=UNSEEN_CHUNKS, heads=(6, 2)),
    soft_cap_e4m3=Case(
        lengths=IDLE_PARTS[:3] + UNSEEN_CHUNKS[:2],
        head_dim=64,
        cache_dtype=E4M3,
        options={"soft_cap": 2.0},
    ),
    many_heads_in_rounds=Case(
        lengths=IDLE_PARTS[:2] + UNSEEN_CHUNKS[:2],
        heads=(20, 10),
        head_dim=64,
        with_sinks=True,
    ),
    quantised_queries=Case(
        lengths=IDLE_PARTS + UNSEEN_CHUNKS,
        heads=(3, 1),
        cache_dtype=E4M3,
        options={"q_scale": 0.01},
    ),
    wide_in_parts=Case(lengths=IDLE_PARTS + UNSEEN_CHUNKS, heads=(2, 1), head_dim=256),
    row_sums_by_vector_units=Case(
        lengths=IDLE_PARTS + UNSEEN_CHUNKS, options={"chip": "v5e"}
    ),
    chunked_in_parts=Case(
        lengths=((1, 40), (64, 64), (64, 300), (64, 448), (50, 290)),
        options={"chunk_prefill_size": 64},
    ),
)
def test_parts_of_a_tile_are_left_out_where_they_do_nothing(case):
    blocks = BlockSizes(decode_block_kv=64, block_q=64, block_kv=512)
    is_chunked = "chunk_prefill_size" in case.options
    distribution = (1, 4, 5) if is_chunked else None
    case = dataclasses.replace(case, blocks=blocks, page_size=64)
    case.check(distribution=distribution)


@cases(
    split=Case(options={"update_kv_cache": False}),
    fused_e4m3=Case(
        options={"update_kv_cache": False, "k_scale": 0.5, "sliding_window": 25},
        cache_dtype=E4M3,
        head_dim=64,
        heads=(3, 1),
        with_sinks=True,
    ),
    full=Case(options={"update_kv_cache": False, "causal": False}),
)
def test_without_update_everything_is_read_from_the_cache(case):
    """Rule 9: nothing is written, and there are no keys and values to pass."""
    case.check()


@cases(
    page_smaller_than_chunk=Case(page_size=8, cache_dtype=E4M3),
    page_is_block=Case(page_size=32, blocks=BlockSizes(32, 32, 32)),
    page_larger_than_block=Case(page_size=512, blocks=BlockSizes(64, 32, 32)),
    page_larger_than_block_with_window=Case(
        page_size=128,
        options={"sliding_window": 40},
        lengths=((1, 200), (1, 130), (1, 96), (45, 150), (33, 33)),
    ),
    blocks_differ=Case(page_size=16, blocks=BlockSizes(64, 64, 128), head_dim=64),
)
def test_pages_and_blocks_of_any_relation_give_the_same_meaning(case):
    case.check()


@cases(
    bf16=Case(
        lengths=((1, 1), (1, 30), (32, 40), (32, 33), (7, 9)),
        options={"chunk_prefill_size": 32},
    ),
    chunk_not_a_power_of_two=Case(
        lengths=((1, 50), (48, 48), (48, 101), (48, 66), (2, 70)),
        options={"chunk_prefill_size": 48, "sliding_window": 50},
        head_dim=64,
        cache_dtype=E4M3,
        with_sinks=True,
    ),
)
def test_chunked_prefill_has_a_loop_of_its_own(case):
    decodes = sum(q_len == 1 for q_len, _ in case.lengths)
    case.check(distribution=(decodes, len(case.lengths) - 1, len(case.lengths)))


def test_positions_beyond_int16_are_told_apart():
    """Rule 1: mask coordinates are int32, also where a window is added to them."""
    case = Case(
        heads=(1, 1),
        head_dim=64,
        page_size=512,
        lengths=((1, 41_003), (3, 32_770)),
        blocks=BlockSizes(2048, 32, 2048),
        options={"sliding_window": 32_500},
    )
    case.check()


@cases(
    full=Case(lengths=((5, 250), (9, 390), (33, 700)), options={"causal": False}),
    window=Case(lengths=((33, 390), (40, 700)), options={"sliding_window": 300}),
)
def test_only_the_end_of_a_block_is_masked(case):
    """Blocks of two chunks of 256 tokens, of which all queries see the first."""
    blocks = BlockSizes(decode_block_kv=32, block_q=32, block_kv=512)
    dataclasses.replace(case, blocks=blocks).check()


@cases(
    causal=Case(head_dim=256, lengths=((3, 7), (150, 201), (1, 100))),
    full=Case(head_dim=256, lengths=((150, 201), (70, 70)), options={"causal": False}),
    full_float8=Case(
        head_dim=136,
        cache_dtype=E4M3,
        page_size=64,
        lengths=((141, 190),),
        options={"causal": False},
    ),
)
def test_wide_new_tokens_come_in_pieces(case):
    """Blocks of 128 tokens, of which the buffers hold 64 new ones at once."""
    blocks = BlockSizes(decode_block_kv=32, block_q=32, block_kv=128)
    dataclasses.replace(case, blocks=blocks).check()


@pytest.mark.skipif(HAS_TPU, reason="compiles for the TPU there is, not for v6e")
@cases(
    split=Case(cache_dtype=E4M3, options={"k_scale": 0.5, "v_scale": 2.0}),
    fused_sinks=Case(
        cache_dtype=E4M3, head_dim=64, with_sinks=True, options={"soft_cap": 3.0}
    ),
    quantised_queries=Case(cache_dtype=E4M3, options={"q_scale": 0.01}),
    e5m2=Case(cache_dtype=E5M2),
    odd_key_head=Case(cache_dtype=E4M3, heads=(4, 1), head_dim=64),
    v5e=Case(cache_dtype=E4M3, with_sinks=True, options={"chip": "v5e"}),
)
def test_float8_of_another_bias_gives_the_same(case):
    """On v5e and v6e the bits of e4m3fn are taken as those of e4m3b11fnuz."""
    options = {"chip": "v6e"} | case.options
    dataclasses.replace(case, options=options).check()


# Several tiles within one block, at its seam and across two blocks.
TILES_OF_A_BLOCK = ((141, 190), (70, 70), (101, 250), (1, 9))


@cases(
    carried_window=Case(options={"chip": "v6e", "sliding_window": 90}),
    full=Case(options={"chip": "v6e", "causal": False}),
    carried_wide=Case(options={"chip": "v6e"}, head_dim=256, heads=(4, 2)),
    carried_fused_scaled=Case(options={"chip": "v5e", "k_scale": 0.5}, head_dim=64),
    packed_again=Case(options={"chip": "tpu7x"}),
)
@pytest.mark.skipif(HAS_TPU, reason="compiles for the TPU there is, not for others")
def test_packed_tokens_are_carried_from_tile_to_tile(case):
    """On chips that round to e4m3fn in software; the others pack them again."""
    dataclasses.replace(
        case,
        cache_dtype=E4M3,
        lengths=TILES_OF_A_BLOCK,
        page_size=64,
        blocks=BlockSizes(decode_block_kv=32, block_q=32, block_kv=128),
    ).check()

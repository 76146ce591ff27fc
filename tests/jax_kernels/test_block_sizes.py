"""Default block sizes fit by construction; given ones that do not are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jax_kernels import chips, tuned
from jax_kernels.ragged_paged_attention import (
    BlockSizes,
    block_sizes,
    kv_cache_shape,
    ragged_paged_attention,
)
from jax_kernels.ragged_paged_attention.config import AttentionSpec
from jax_kernels.ragged_paged_attention.kernel.decode.steps import (
    StepCursor,
    describe_step,
)
from jax_kernels.ragged_paged_attention.kernel.schedule import (
    Lengths,
    Schedule,
)
from jax_kernels.ragged_paged_attention.layout import CacheLayout
from jax_kernels.ragged_paged_attention.validation import Problem

ALL_CHIPS = (chips.V5E, chips.V6E, chips.TPU7X, chips.UNKNOWN)
CACHE_DTYPES = ("bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "int8")


def make_problem(
    *,
    num_kv_heads: int = 8,
    group: int = 4,
    head_dim: int = 128,
    page_size: int = 128,
    pages_per_sequence: int = 64,
    num_sequences: int = 128,
    num_tokens: int = 256,
    q_dtype: str = "bfloat16",
    cache_dtype: str = "bfloat16",
) -> Problem:
    return Problem(
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        pages_per_sequence=pages_per_sequence,
        num_q_heads=num_kv_heads * group,
        q_dtype=jnp.dtype(q_dtype),
        out_dtype=jnp.dtype(q_dtype),
        cache=CacheLayout(1000, page_size, num_kv_heads, head_dim, cache_dtype),
    )


problems = st.builds(
    make_problem,
    num_kv_heads=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 10, 16, 32]),
    group=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16]),
    head_dim=st.integers(32, 512),
    page_size=st.sampled_from([8, 16, 32, 64, 128, 256, 512]),
    pages_per_sequence=st.integers(1, 300),
    num_sequences=st.just(8),
    num_tokens=st.integers(1, 20_000),
    q_dtype=st.sampled_from(["bfloat16", "float32"]),
    cache_dtype=st.sampled_from(CACHE_DTYPES),
).filter(
    lambda problem: (
        problem.num_q_heads <= 128
        and problem.num_q_heads * problem.cache.lanes <= 128 * 256
        and problem.num_kv_heads * problem.cache.lanes <= 32 * 256
    )
)


def is_beyond_an_unknown_chip(problem: Problem) -> bool:
    """Whether one register of tokens of all heads may exceed 32 MiB of VMEM."""
    lanes = problem.cache.lanes
    rows, key_rows = problem.num_q_heads, problem.num_kv_heads
    return rows * lanes > 48 * 256 or key_rows * lanes > 16 * 256 or key_rows > 16


@settings(deadline=None, max_examples=300)
@given(
    problem=problems,
    chip=st.sampled_from(ALL_CHIPS),
    has_sinks=st.booleans(),
    update=st.booleans(),
    chunk=st.none() | st.integers(1, 5000),
    decode_q_len=st.sampled_from([1, 2, 5, 16]),
)
def test_default_sizes_fit_every_chip(
    problem, chip, has_sinks, update, chunk, decode_q_len
):
    """Rule 12: no exception at defaults, up to 128 query and 32 key heads of 256, or 64
    and 16 of 512, on one device, and up to 48 and 16 of 256, or so many numbers, on a
    chip of which nothing is known."""
    assume(chip is not chips.UNKNOWN or not is_beyond_an_unknown_chip(problem))
    spec = AttentionSpec(
        has_sinks=has_sinks, update_kv_cache=update, decode_q_len=decode_q_len
    )
    blocks = block_sizes.choose(problem, spec, chip)
    config = block_sizes.make_config(problem, spec, blocks, chunk, False, chip)
    limit = int(chip.vmem_bytes * block_sizes.VMEM_LIMIT_SHARE)
    block_sizes.check_fits(problem, config, chip, limit)
    assert block_sizes.vmem_bytes(config) <= limit


@pytest.mark.parametrize("chip", ALL_CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e4m3fn"])
def test_sizes_of_batch_invariant_do_not_follow_the_batch(cache_dtype, chip):
    """Neither buckets nor records that were tuned for some of them change a size."""
    spec = AttentionSpec(batch_invariant=True)
    chosen = set()
    for num_tokens, num_sequences, pages in [(1, 1, 1), (64, 64, 9), (8192, 16, 256)]:
        problem = make_problem(
            cache_dtype=cache_dtype,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            pages_per_sequence=pages,
        )
        choice = block_sizes.explain(problem, spec, chip)
        config = block_sizes.make_config(
            problem, spec, choice.blocks, None, False, chip
        )
        limit = int(chip.vmem_bytes * block_sizes.VMEM_LIMIT_SHARE)
        block_sizes.check_fits(problem, config, chip, limit)
        chosen.add((choice.blocks, config.phases))
    assert len(chosen) == 1


@pytest.mark.parametrize("chip", ALL_CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e4m3fn"])
def test_an_ordinary_model_gets_large_blocks(cache_dtype, chip):
    """Llama-3-8B: what a chip has is used, and half of it stays free for spills."""
    problem = make_problem(cache_dtype=cache_dtype, num_tokens=4096)
    blocks = block_sizes.choose(problem, AttentionSpec(), chip)
    assert blocks.decode_block_kv >= 256
    assert blocks.block_kv >= 256
    assert blocks.block_q >= 64


def test_wide_heads_get_long_blocks_on_tpu7x():
    """32/8 heads of 256 nearly fill VMEM, and need 1024 tokens to be fast."""
    problem = make_problem(head_dim=256, num_tokens=8192)
    spec = AttentionSpec()
    model = block_sizes.preferred(problem, spec)
    blocks = block_sizes.fit(problem, spec, chips.TPU7X, model)
    assert (blocks.block_q, blocks.block_kv) == (128, 1024)


@pytest.mark.parametrize(
    "window, decode_block_kv, block_kv",
    [(1, 128, 512), (128, 128, 512), (200, 512, 512), (900, 512, 1024)],
)
def test_a_window_bounds_the_blocks(window, decode_block_kv, block_kv):
    """A tile has 256 queries, so it sees the window and 255 more.

    A decode query sees a window that begins at any of the 128 places of a page, or at
    its own start if it is a power of two.
    """
    spec = AttentionSpec(sliding_window=window)
    blocks = block_sizes.preferred(make_problem(num_tokens=4096), spec)
    assert blocks == BlockSizes(decode_block_kv, 256, block_kv)


@pytest.mark.parametrize("page_size", [16, 32, 128])
@pytest.mark.parametrize("window", [2, 128, 129, 1000])
def test_a_decode_query_meets_one_block_of_its_window(window, page_size):
    """Wherever its context ends; key and value of one head are few bytes."""
    problem = make_problem(
        num_kv_heads=1, group=8, page_size=page_size, pages_per_sequence=2048
    )
    spec = AttentionSpec(sliding_window=window)
    blocks = block_sizes.choose(problem, spec, chips.TPU7X)
    config = block_sizes.make_config(problem, spec, blocks, None, False)
    schedule = Schedule(config, config.phases[0])
    for kv_len in range(3000, 3000 + page_size):
        step, _ = describe_step(
            schedule, StepCursor(0, 0), 1, lambda _, end=kv_len: Lengths(0, 1, end)
        )
        assert [cell.visible_end > 0 for cell in step.cells[:2]] == [True, False]


def test_steps_of_small_blocks_have_more_cells():
    """A step is 4 MiB, unless that were more than 16 cells, or 4 short ones."""

    def cells(num_kv_heads: int, decode_block_kv: int) -> int:
        problem = make_problem(num_kv_heads=num_kv_heads)
        blocks = BlockSizes(decode_block_kv, 128, 256)
        config = block_sizes.make_config(problem, AttentionSpec(), blocks, None, False)
        return config.phases[0].cells_per_step

    assert [cells(8, size) for size in (4096, 512, 256, 128)] == [1, 2, 4, 4]
    assert [cells(1, size) for size in (2048, 512, 256, 128)] == [4, 16, 16, 4]


@pytest.mark.parametrize(
    "num_kv_heads, page_size, chip, rings",
    [
        (1, 128, chips.TPU7X, 2),
        (1, 16, chips.TPU7X, 1),  # 512 pages are too much code
        (8, 128, chips.TPU7X, 1),  # 8 pages are started soon
        (1, 128, chips.UNKNOWN, 1),  # with too little memory
    ],
)
def test_steps_of_many_pages_have_two_rings(num_kv_heads, page_size, chip, rings):
    problem = make_problem(num_kv_heads=num_kv_heads, group=8, page_size=page_size)
    blocks = BlockSizes(2048 if num_kv_heads == 1 else 512, 128, 256)
    config = block_sizes.make_config(
        problem, AttentionSpec(), blocks, None, False, chip
    )
    decode = config.phases[0]
    assert decode.num_kv_rings == rings
    assert decode.slots_per_kv_ring * rings == decode.num_slots


def test_few_key_heads_get_long_tiles():
    def block_q(num_kv_heads: int) -> int:
        problem = make_problem(num_kv_heads=num_kv_heads, group=8)
        return block_sizes.preferred(problem, AttentionSpec()).block_q

    assert [block_q(heads) for heads in (8, 4, 2, 1)] == [128, 128, 256, 512]


def test_a_short_context_gets_short_blocks():
    """No block is longer than the longest sequence that the page table can hold."""
    problem = make_problem(page_size=16, pages_per_sequence=8)
    blocks = block_sizes.choose(problem, AttentionSpec(), chips.V6E)
    assert max(blocks.decode_block_kv, blocks.block_kv) <= 128


def tuned_record(chip: chips.Chip, phase: str, blocks: dict, **problem):
    tuned_problem = make_problem(**problem)
    spec = AttentionSpec()
    shape = block_sizes.tuned_shape(tuned_problem, spec)
    model = dataclasses.asdict(block_sizes.preferred(tuned_problem, spec))
    cycles = {"step": 1}
    default = {name: model[name] for name in blocks}
    return tuned.TunedBlocks(
        chip.name, phase, shape, blocks, default, "prediction", cycles, cycles, {}
    )


def test_each_phase_is_tuned_or_nearly_or_from_the_model():
    problem = make_problem(num_tokens=4096)
    model = block_sizes.explain(problem, AttentionSpec(), chips.V6E, [])
    assert (model.decode_source, model.prefill_source) == ("model", "model")
    decode = tuned_record(chips.V6E, "decode", {"decode_block_kv": 256})
    blocks = {"block_q": 64, "block_kv": 1024}
    prefill = tuned_record(chips.V6E, "prefill", blocks, page_size=64)

    choice = block_sizes.explain(problem, AttentionSpec(), chips.V6E, [decode])
    assert choice.blocks == dataclasses.replace(model.blocks, decode_block_kv=256)
    assert (choice.decode_source, choice.prefill_source) == ("tuned", "model")

    records = [decode, prefill]
    choice = block_sizes.explain(problem, AttentionSpec(), chips.V6E, records)
    assert choice.blocks == BlockSizes(256, 64, 1024)
    assert choice.prefill_source.startswith("tuned for 32/8 heads of 128")
    assert choice.prefill_source.endswith("page 64")

    other = block_sizes.explain(problem, AttentionSpec(), chips.V5E, records)
    assert (other.decode_source, other.prefill_source) == ("model", "model")


def test_a_near_shape_takes_the_ratio_to_the_model():
    """Twice as many heads in a group: the model's tile has half as many tokens."""
    problem = make_problem(num_tokens=4096, group=8)
    model = block_sizes.preferred(make_problem(), AttentionSpec())
    blocks = dataclasses.asdict(model)
    same = {name: blocks[name] for name in tuned.PHASES["prefill"]}
    model = block_sizes.explain(problem, AttentionSpec(), chips.V6E, [])
    near = [tuned_record(chips.V6E, "prefill", same)]
    choice = block_sizes.explain(problem, AttentionSpec(), chips.V6E, near)
    assert choice.blocks == model.blocks
    assert choice.prefill_source.startswith("tuned for 32/8 heads")


def test_tuned_sizes_are_cut_to_the_problem():
    """To the context of 128 tokens, and to the 8 tokens of the step."""
    records = [
        tuned_record(chips.V6E, "decode", {"decode_block_kv": 4096}),
        tuned_record(chips.V6E, "prefill", {"block_q": 512, "block_kv": 4096}),
    ]
    problem = make_problem(pages_per_sequence=1, num_tokens=8)
    choice = block_sizes.explain(problem, AttentionSpec(), chips.V6E, records)
    assert choice.blocks == BlockSizes(128, 32, 128)
    assert choice.decode_source == "tuned"


def test_tuned_sizes_are_cut_to_the_memory_phase_by_phase():
    records = [
        tuned_record(chips.V6E, "decode", {"decode_block_kv": 512}),
        tuned_record(chips.V6E, "prefill", {"block_q": 2048, "block_kv": 8192}),
    ]
    problem = make_problem(num_tokens=8192)
    blocks = block_sizes.explain(problem, AttentionSpec(), chips.V6E, records).blocks
    assert blocks.decode_block_kv == 512
    assert blocks.block_q * blocks.block_kv < 2048 * 8192
    config = block_sizes.make_config(problem, AttentionSpec(), blocks, None, False)
    assert block_sizes.vmem_bytes(config) <= chips.V6E.vmem_bytes


@pytest.mark.parametrize("explicit", [None, BlockSizes(128, 64, 256)])
def test_an_explicit_choice_always_wins(explicit, monkeypatch):
    launched = []

    def make_config(problem, spec, blocks, *rest):
        launched.append(blocks)
        return made(problem, spec, blocks, *rest)

    made = block_sizes.make_config
    blocks = {"decode_block_kv": 512}
    records = (tuned_record(chips.V6E, "decode", blocks),)
    monkeypatch.setattr(tuned, "shipped", lambda: records)
    monkeypatch.setattr(block_sizes, "make_config", make_config)
    trace(make_problem(), block_sizes=explicit, chip="v6e")
    expected = explicit.decode_block_kv if explicit else 512
    assert launched[-1].decode_block_kv == expected


def test_a_chunk_size_bounds_the_tile_of_its_loop():
    problem = make_problem()
    blocks = BlockSizes(256, 256, 256)
    config = block_sizes.make_config(problem, AttentionSpec(), blocks, 40, False)
    assert [phase.block_q for phase in config.phases] == [1, 64, 256]
    config = block_sizes.make_config(problem, AttentionSpec(), blocks, None, False)
    assert [phase.block_q for phase in config.phases] == [1, 256]


def make_arguments(problem: Problem) -> list[jax.ShapeDtypeStruct]:
    """The arguments of the operator, as shapes."""
    cache = problem.cache
    sequences = problem.num_sequences
    tokens = (problem.num_tokens, problem.num_kv_heads, problem.head_dim)
    shape = kv_cache_shape(
        cache.num_pages,
        cache.page_size,
        cache.num_kv_heads,
        cache.head_dim,
        cache.dtype,
    )
    queries = (problem.num_tokens, problem.num_q_heads, problem.head_dim)
    return [
        jax.ShapeDtypeStruct(queries, problem.q_dtype),
        jax.ShapeDtypeStruct(tokens, problem.q_dtype),
        jax.ShapeDtypeStruct(tokens, problem.q_dtype),
        jax.ShapeDtypeStruct(shape, cache.dtype),
        *(
            jax.ShapeDtypeStruct((size,), jnp.int32)
            for size in (
                sequences,
                sequences * problem.pages_per_sequence,
                sequences + 1,
                3,
            )
        ),
    ]


def trace(problem: Problem, **options) -> None:
    def call(*arguments):
        return ragged_paged_attention(*arguments, **options)

    jax.eval_shape(call, *make_arguments(problem))


@pytest.mark.parametrize(
    "blocks",
    [BlockSizes(16384, 32, 128), BlockSizes(128, 4096, 128), BlockSizes(128, 32, 8192)],
    ids=["decode_block_kv", "block_q", "block_kv"],
)
def test_sizes_that_do_not_fit_are_refused_with_the_estimate(blocks):
    with pytest.raises(
        ValueError,
        match=r"block_sizes: .* need about [\d,]+ bytes of VMEM, more than the limit "
        r"of [\d,]+ on chip tpu7x; use smaller block_q",
    ):
        trace(make_problem(), block_sizes=blocks, chip="tpu7x")


@pytest.mark.slow
def test_a_vmem_limit_is_respected():
    problem = make_problem()
    blocks = BlockSizes(1024, 256, 512)
    trace(problem, block_sizes=blocks, chip="tpu7x")
    with pytest.raises(ValueError, match="more than the limit of 10,000,000 on"):
        trace(problem, block_sizes=blocks, chip="tpu7x", vmem_limit_bytes=10_000_000)
    # Without sizes, smaller ones are chosen.
    trace(problem, chip="tpu7x", vmem_limit_bytes=10_000_000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cache_dtype, least", [("float32", 8), ("bfloat16", 16), ("int8", 32)]
)
@pytest.mark.parametrize("field", ["decode_block_kv", "block_kv"])
def test_a_block_holds_at_least_one_register_of_tokens(field, cache_dtype, least):
    problem = make_problem(cache_dtype=cache_dtype)
    blocks = dataclasses.replace(BlockSizes(128, 32, 128), **{field: least})
    trace(problem, block_sizes=blocks)
    blocks = dataclasses.replace(blocks, **{field: least // 2})
    with pytest.raises(ValueError, match=f"{field}: expected at least {least} for"):
        trace(problem, block_sizes=blocks)


def test_a_tile_holds_at_least_one_register_of_queries():
    with pytest.raises(ValueError, match=r"block_q: expected at least 32, got 16"):
        trace(make_problem(), block_sizes=BlockSizes(128, 16, 128))


def test_a_page_table_larger_than_smem_is_refused():
    """1024 sequences x 1024 pages x 4 bytes are 4 MiB; SMEM has 1 MiB."""
    problem = make_problem(num_sequences=1024, pages_per_sequence=1024)
    with pytest.raises(
        ValueError,
        match=r"page_indices: .* need [\d,]+ bytes of SMEM \(1024 sequences x 1024 "
        r"pages\), .* use fewer sequences, a larger page_size or fewer pages",
    ):
        trace(problem)
    trace(make_problem(num_sequences=200, pages_per_sequence=1024))


def test_smem_counts_the_table_the_lengths_and_the_sinks():
    problem = make_problem(num_sequences=3, pages_per_sequence=5)
    assert block_sizes.smem_bytes(problem) == 4 * (3 * 5 + 3 + 4 + 3 + 32)

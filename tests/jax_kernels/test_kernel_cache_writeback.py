"""What the kernel writes to the cache, and what it leaves alone.

A wrong write-back is invisible in the output of the same call: the new tokens are
attended from VMEM. It shows in the next step, or in another sequence. So these tests
look at the bytes.
"""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_kernels.ragged_paged_attention import BlockSizes
from tests.support import oracle
from tests.support.interpret import assert_kernel_matches_oracle, run_kernel
from tests.support.numerics import assert_same_bytes
from tests.support.ragged_batches import make_ragged_batch

OPTIONS: dict[str, Any] = {"sm_scale": 0.1}
LAYOUTS = {
    "split_f32": {"q_dtype": "float32", "head_dim": 72},
    "split_bf16": {"q_dtype": "bfloat16", "head_dim": 128},
    "odd_key_heads": {
        "q_dtype": "bfloat16",
        "head_dim": 128,
        "num_q_heads": 6,
        "num_kv_heads": 3,
    },
    "fused_e5m2": {
        "q_dtype": "bfloat16",
        "cache_dtype": "float8_e5m2",
        "head_dim": 40,
    },
    "split_int8": {"q_dtype": "bfloat16", "cache_dtype": "int8", "head_dim": 128},
}


def rows_of_new_tokens(batch) -> set[tuple[int, int]]:
    """(page, slot) of every new token, by plain counting."""
    found = set()
    for s in range(batch.distribution[2]):
        q_len = batch.cu_q_lens[s + 1] - batch.cu_q_lens[s]
        for position in range(batch.kv_lens[s] - q_len, batch.kv_lens[s]):
            page = batch.page_table[s, position // batch.page_size]
            found.add((int(page), int(position % batch.page_size)))
    return found


def by_slot(kv_cache: np.ndarray) -> np.ndarray:
    """The bytes of a cache as [N, page_size, anything]."""
    num_pages, heads, rows, packing, _ = kv_cache.shape
    as_bytes = np.ascontiguousarray(kv_cache).view(np.uint8)
    as_bytes = as_bytes.reshape(num_pages, heads, rows * packing, -1)
    return np.moveaxis(as_bytes, 1, 2).reshape(num_pages, rows * packing, -1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_slots_of_new_tokens_change(layout):
    """Rule 8, in bytes. The neighbours in a packed row are kept: the old token before
    a chunk, the dead slot behind it with whatever NaN it holds."""
    sequences = [(1, 1), (1, 18), (1, 31), (1, 32), (3, 10), (70, 75), (33, 33)]
    batch = make_ragged_batch(sequences, nan_payloads=True, **LAYOUTS[layout])
    before = batch.kv_cache.copy()
    _, after = assert_kernel_matches_oracle(batch, **OPTIONS)
    differs = (by_slot(before) != by_slot(after)).any(axis=-1)
    changed = {(int(page), int(slot)) for page, slot in np.argwhere(differs)}
    assert changed == rows_of_new_tokens(batch)


# Without a causal mask every tile visits every block, which takes three times as long:
# one sequence shows it, and the others are left to a longer run.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("causal", "lengths_before"),
    [
        pytest.param(True, (1, 3, 38), id="causal"),
        pytest.param(False, (3,), id="full"),
        pytest.param(False, (1, 38), id="more_full", marks=pytest.mark.extended),
    ],
)
def test_the_row_of_old_and_new_tokens_reaches_every_tile(causal, lengths_before):
    """Chunks of several tiles that start within a packed row (the seam)."""
    batch = make_ragged_batch(
        [(70, num_old + 70) for num_old in lengths_before],
        q_dtype="bfloat16",
        cache_dtype="float8_e4m3fn",
        head_dim=64,
    )
    assert_kernel_matches_oracle(batch, causal=causal, **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [16, 128], ids=lambda size: f"page{size}")
def test_a_long_chunk_reads_back_what_it_has_written(page_size):
    """More cells than the ring has slots, so early tiles are stored by then."""
    batch = make_ragged_batch(
        [(1, 33), (163, 201)],
        q_dtype="bfloat16",
        head_dim=128,
        page_size=page_size,
        num_q_heads=2,
    )
    blocks = BlockSizes(decode_block_kv=32, block_q=32, block_kv=64)
    assert_kernel_matches_oracle(batch, block_sizes=blocks, **OPTIONS)


@pytest.mark.slow
def test_many_short_sequences_are_all_written_before_the_kernel_ends():
    """Rule 7: more write-backs than the rings have slots, in both loops."""
    sequences = [(1, 3 * s + 1) for s in range(15)] + [(2, 2 + s) for s in range(12)]
    batch = make_ragged_batch(sequences, q_dtype="bfloat16", head_dim=64)
    assert_kernel_matches_oracle(batch, **OPTIONS)


@pytest.mark.slow
def test_appended_tokens_are_visible_to_the_next_steps():
    """A prompt in two chunks and three decodes, each reading what the last wrote."""
    page_size, head_dim = 16, 64
    table = np.array([[5, 2, 7, 0], [1, 6, 3, 4]], np.int32)
    batch = make_ragged_batch(
        [], max_sequences=2, num_tokens=60, num_spare_pages=8, q_dtype="bfloat16"
    )
    kv_cache = batch.kv_cache
    kv_lens = np.zeros(2, np.int32)
    rng = np.random.default_rng(0)
    for q_lens in ([21, 35], [16, 3], [1, 1], [1, 1], [1, 1]):
        kv_lens = kv_lens + np.array(q_lens, np.int32)
        queries, keys, values = (
            rng.standard_normal((60, heads, head_dim)).astype(ml_dtypes.bfloat16)
            for heads in (4, 2, 2)
        )
        num_decodes = 2 if max(q_lens) == 1 else 0
        step = batch.replace(
            queries=queries,
            keys=keys,
            values=values,
            kv_cache=kv_cache,
            kv_lens=kv_lens,
            page_indices=table.reshape(-1),
            cu_q_lens=np.array([0, *np.cumsum(q_lens)], np.int32),
            distribution=np.array([num_decodes, num_decodes, 2], np.int32),
            page_size=page_size,
        )
        _, kv_cache = assert_kernel_matches_oracle(step, **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["split_bf16", "fused_e5m2"])
def test_sequences_that_share_prefix_pages_leave_them_alone(layout):
    """Rule 8: prefix caching."""
    batch = make_ragged_batch(
        [(1, 33), (1, 50), (7, 40), (40, 72)],
        shared_prefix_pages=2,
        **LAYOUTS[layout],
    )
    shared = set(batch.page_table[0, :2])
    assert all(set(batch.page_table[s, :2]) == shared for s in range(4))
    before = batch.kv_cache.copy()
    _, after = assert_kernel_matches_oracle(batch, **OPTIONS)
    assert_same_bytes(after[sorted(shared)], before[sorted(shared)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, low, high",
    [
        ("float8_e4m3fn", -448.0, 448.0),
        ("float8_e5m2", -57344.0, 57344.0),
        ("int8", -128.0, 127.0),
    ],
)
def test_new_tokens_are_clipped_to_the_range_of_the_cache(dtype, low, high):
    """Rule 10: an overflow would become NaN or infinity."""
    batch = make_ragged_batch(
        [(1, 5), (6, 9)], q_dtype="bfloat16", cache_dtype=dtype, head_dim=128
    )
    huge = np.where(np.arange(128) % 2, -1e30, 1e30).astype(ml_dtypes.bfloat16)
    values = np.broadcast_to(huge, batch.values.shape).copy()
    batch = batch.replace(values=values)
    out, kv_cache = assert_kernel_matches_oracle(batch, v_scale=2.0, **OPTIONS)
    assert np.isfinite(out.astype(np.float32)).all()
    address = oracle.slot_address(kv_cache, 2, 128, batch.page_size)
    pages, slots = zip(*sorted(rows_of_new_tokens(batch)), strict=True)
    _, stored = oracle.read_slots(kv_cache, address, pages, slots)
    assert set(np.unique(stored[..., 0::2].astype(np.float32))) == {high}
    assert set(np.unique(stored[..., 1::2].astype(np.float32))) == {low}


@pytest.mark.slow
@pytest.mark.parametrize("head_dim, lanes", [(72, (72, 128)), (40, (40, 64))])
def test_lanes_of_padding_become_zero_in_the_slots_written(head_dim, lanes):
    batch = make_ragged_batch(
        [(1, 6), (20, 33)], q_dtype="float32", head_dim=head_dim, nan_payloads=True
    )
    _, kv_cache = assert_kernel_matches_oracle(batch, **OPTIONS)
    num_pages, heads, _, _, width = kv_cache.shape
    slots = kv_cache.reshape(num_pages, heads, batch.page_size, width)
    for page, slot in rows_of_new_tokens(batch):
        assert not slots[page, :, slot, slice(*lanes)].any()
        assert slots[page, :, slot, : lanes[0]].any()


@pytest.mark.slow
def test_without_update_no_byte_changes():
    """Rule 9, even though keys and values are given."""
    batch = make_ragged_batch(
        [(1, 20), (9, 40)], cache_holds_new_tokens=True, nan_payloads=True
    )
    before = batch.kv_cache.copy()
    out, after = run_kernel(batch.jax_arguments, update_kv_cache=False, **OPTIONS)
    assert_same_bytes(after, before)
    assert np.isfinite(out).all()

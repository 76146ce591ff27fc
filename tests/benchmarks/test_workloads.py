"""Ideal bytes and FLOPs, counted one by one, and the kernel's scalar operands."""

import itertools

import numpy as np
import pytest

from benchmarks.tpu_timing import workloads
from benchmarks.tpu_timing.workloads import Sequence
from jax_kernels import chips

SHAPE = workloads.RpaShape(
    max_seqs=4,
    pages_per_seq=8,
    num_pages=64,
    page_size=16,
    num_q_heads=8,
    num_kv_heads=2,
    head_dim=128,
    q_bytes=2,
    kv_bytes=2,
)


def test_sequences_are_parsed():
    sequences = workloads.parse_sequences("2*1/64,16/32")
    assert sequences == [Sequence(1, 64)] * 2 + [Sequence(16, 32)]


@pytest.mark.parametrize("text", ["", "1", "2*1", "a/b", "5/4", "0/4"])
def test_a_bad_sequence_is_named(text):
    with pytest.raises(ValueError, match=r"sequences: expected .* got"):
        workloads.parse_sequences(text)


def test_operands():
    sequences = workloads.parse_sequences("2*1/64,16/32")
    operands = workloads.scalar_operands(SHAPE, sequences)
    assert operands[0].tolist() == [64, 64, 32, 0]
    assert operands[2].tolist() == [0, 1, 2, 18, 18]
    assert operands[3].tolist() == [2, 2, 3]
    table = operands[1].reshape(4, 8)
    pages = np.concatenate([table[0, :4], table[1, :4], table[2, :2]])
    assert len(set(pages.tolist())) == 10
    chunked = workloads.scalar_operands(SHAPE, sequences, chunked=True)
    assert chunked[3].tolist() == [2, 3, 3]


def test_decodes_come_first():
    with pytest.raises(ValueError, match="must come first"):
        workloads.scalar_operands(SHAPE, workloads.parse_sequences("16/32,1/64"))


def test_more_pages_than_the_table_holds_is_an_error():
    with pytest.raises(ValueError, match="needs 9 pages"):
        workloads.scalar_operands(SHAPE, [Sequence(1, 8 * 16 + 1)])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
def test_visible_tokens_and_pairs_by_counting(window, causal):
    for kv_len, q_len in itertools.product([1, 7, 20], [1, 5, 7]):
        if q_len > kv_len:
            continue
        pairs = [
            (q, k)
            for q in range(kv_len - q_len, kv_len)
            for k in range(kv_len)
            if (k <= q or not causal) and (window is None or k > q - window)
        ]
        sequence = Sequence(q_len, kv_len)
        assert workloads.visible_pairs(sequence, window, causal) == len(pairs)
        seen = len({k for _, k in pairs})
        assert workloads.visible_tokens(sequence, window) == seen


def test_ideal_counts_every_byte_once():
    needed = workloads.ideal(SHAPE, [Sequence(16, 32)])
    token = 2 * 2 * 128 * 2  # keys and values, 2 heads of 128 in bf16
    query = 8 * 128 * 2
    assert needed.kv_read_bytes == 32 * token
    assert needed.bytes == 32 * token + 16 * query + 16 * (query + token)
    assert needed.flops == 4 * 8 * 128 * sum(range(17, 33))
    assert needed.unmasked_flops == 4 * 8 * 128 * 16 * 32


def test_a_window_needs_no_bytes_before_it():
    near = workloads.ideal(SHAPE, [Sequence(1, 200)], window=128)
    far = workloads.ideal(SHAPE, [Sequence(1, 20000)], window=128)
    assert near == workloads.Ideal(
        **{**vars(far), "unmasked_flops": near.unmasked_flops}
    )


def test_utilization_at_the_ideal_time_is_full():
    chip = chips.TPU7X
    needed = workloads.ideal(SHAPE, [Sequence(1, 100)])
    shares = workloads.utilization(
        needed.bytes / chip.rates.hbm_bytes_per_s, chip, needed
    )
    assert shares["mbu"] == pytest.approx(1)
    assert shares["mfu"] < 1

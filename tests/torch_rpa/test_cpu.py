"""What CPU tensors take, beside the reference: which sequences attend together."""

import numpy as np
import pytest
import torch

import torch_rpa
from jax_kernels.contract import AttentionOptions, CallSizes
from tests.torch_rpa.calls import make_call, raw_bytes
from torch_rpa import cpu, reference
from torch_rpa.validation import Inputs, host_metadata, validate_static

MANY = [*((1, n) for n in (9, 30, 1, 8, 31, 17)), (2, 20), (3, 3), (1, 25), (9, 32)]


def both(lengths, *, options=None, **arguments):
    """Runs a call, and the same call by the reference; returns both pairs."""
    options = AttentionOptions(sm_scale=0.125, **(options or {}))
    results = []
    for run in (
        cpu.ragged_paged_attention_,
        reference.ragged_paged_attention_,
    ):
        call = make_call(lengths, num_pages=64, max_seqs=12, **arguments)
        attention = run(Inputs(*call), options)
        results.append((attention, raw_bytes(call.kv_cache)))
    return results


@pytest.fixture(params=[0, cpu.MAX_WASTE], ids=["two parts", "one part"])
def max_waste(request, monkeypatch):
    """Whether sequences of all lengths attend together, or only similar ones."""
    cpu._plan_of_bytes.cache_clear()
    monkeypatch.setattr(cpu, "MAX_WASTE", request.param)


@pytest.mark.usefixtures("max_waste")
@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, {}),
        ({"cache_dtype": torch.float32, "head_dim": 64}, {"sliding_window": 7}),
        ({"sinks": True, "head_dim": 32}, {"sliding_window": 1}),
        ({"sinks": True}, {"soft_cap": 2.0}),
        ({"cache_dtype": torch.int8}, {"q_scale": 0.1, "k_scale": 0.1, "v_scale": 2.0}),
        ({"cache_dtype": torch.float8_e4m3fn}, {"causal": False}),
        ({"num_q_heads": 7, "num_kv_heads": 1, "head_dim": 96}, {"soft_cap": 1.0}),
        ({"dtype": torch.bfloat16}, {"out_dtype": "float32", "sliding_window": 19}),
    ],
    ids=str,
)
def test_many_sequences_give_what_the_reference_gives(arguments, options):
    (out, cache), (expected, expected_cache) = both(MANY, options=options, **arguments)
    assert torch.equal(cache, expected_cache)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 10])
def test_slots_that_no_query_sees_may_hold_nan(window):
    """Sequences of several lengths attend together, so each meets dead slots."""

    def run(poison):
        call = make_call([(1, n) for n in (9, 12, 15, 16)], cache_dtype=torch.float32)
        pages = torch_rpa.unpack_kv_cache(call.kv_cache, 2, 128)
        alive = torch.zeros(pages.shape[0], 8, dtype=torch.bool)
        table = call.page_indices.view(5, 4)
        for seq, kv_len in enumerate((9, 12, 15, 16)):
            for t in range(max(0, kv_len - (window or kv_len)), kv_len):
                alive[table[seq, t // 8], t % 8] = True
        pages.masked_fill_(~alive[:, None, None, :, None], poison)
        return torch_rpa.ragged_paged_attention(*call, sliding_window=window)

    out = run(float("nan"))
    assert out[:4].isfinite().all()
    assert torch.equal(out, run(0.0))


def plan_of(lengths, sliding_window=None) -> tuple[cpu.Plan, CallSizes]:
    call = make_call(lengths, num_pages=64, max_seqs=12)
    sizes = validate_static(Inputs(*call), AttentionOptions())
    options = AttentionOptions(sliding_window=sliding_window)
    return cpu.plan_step(host_metadata(Inputs(*call)), sizes, options), sizes


def test_sequences_of_similar_length_attend_together(monkeypatch):
    monkeypatch.setattr(cpu, "MAX_WASTE", 0)
    plan, sizes = plan_of(MANY)
    # Pages of 8 tokens: 1 and 8 have one page; 9, 17 and 25 have two to four.
    assert [part.tokens.tolist() for part in plan.decodes] == [[2, 3, 0], [5, 1, 4, 11]]
    assert [part.tokens.tolist() for part in plan.others] == [
        [6, 7],
        [8, 9, 10],
        [*range(12, 21)],
    ]
    assert len(plan.slots) == plan.num_tokens * sizes.cache.heads_per_page


def test_a_window_gathers_only_its_pages():
    plan, sizes = plan_of([(1, 30), (2, 30)], sliding_window=5)
    (decode,), (other,) = plan.decodes, plan.others
    assert (decode.begin, decode.width) == (1, 5)  # 25..29 of the page from 24 on
    assert (other.begin, other.width) == (0, 6)
    for part in (decode, other):
        assert len(part.head_pages) == sizes.cache.heads_per_page
        assert part.mask is None and not part.dead_slots


def test_the_plan_follows_numbers_that_change_in_place():
    """Plans are kept by content: the same tensors may hold other numbers later."""
    call = make_call([(1, 9)])
    torch_rpa.ragged_paged_attention(*call)
    call.kv_lens[0] = 8
    changed = make_call([(1, 9)])
    torch_rpa.ragged_paged_attention(*changed)
    expected = changed.kv_cache.clone()
    out = torch_rpa.ragged_paged_attention(*call)
    changed.kv_lens[0] = 8
    again = torch_rpa.ragged_paged_attention(*changed, impl="reference")
    torch.testing.assert_close(out, again, rtol=1e-5, atol=1e-5)
    assert torch.equal(call.kv_cache, changed.kv_cache)
    assert not torch.equal(call.kv_cache, expected)


def test_numbers_out_of_range_are_refused_each_time():
    call = make_call([(1, 9)])
    call.page_indices[1] = -1
    before = call.kv_cache.clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"page_indices\[1\]"):
            torch_rpa.ragged_paged_attention(*call)
    assert torch.equal(call.kv_cache, before)


@pytest.mark.parametrize(
    ("max_waste", "groups"),
    [
        (0, [[0, 1], [2, 3], [4, 5]]),
        (3, [[0, 1, 2], [3, 4], [5]]),  # 1 + 2 are in vain in the first
        (99, [[0, 1, 2, 3, 4, 5]]),
    ],
)
def test_similar_sizes_are_split_where_they_spread(max_waste, groups):
    sizes = np.array([1, 2, 3, 4, 8, 9])
    split = cpu._similar(np.arange(6), sizes, max_waste)
    assert [group.tolist() for group in split] == groups


def test_no_sizes_make_no_group():
    assert not [*cpu._similar(np.arange(0), np.arange(0), 0)]

"""CPU tensors, and the reference: against float64, and on cases worked out by hand."""

import math

import pytest
import torch

import torch_rpa
from tests.torch_rpa.calls import (
    assert_matches_oracle,
    from_batch,
    make_call,
    raw_bytes,
)
from tests.torch_rpa.scenarios import SCENARIOS, make_scenario
from torch_rpa import cpu, reference
from torch_rpa.options import AttentionOptions


@pytest.fixture(autouse=True, params=["cpu", "reference"])
def implementation(request, monkeypatch):
    """What the operator runs on CPU tensors."""
    if request.param == "reference":
        monkeypatch.setattr(
            cpu, "ragged_paged_attention_", reference.ragged_paged_attention_
        )


@pytest.mark.parametrize("name", SCENARIOS)
def test_reference_matches_the_float64_oracle(name):
    batch, options, oracle_options = make_scenario(name)
    call = from_batch(batch)
    out = torch_rpa.ragged_paged_attention(*call, **options)
    assert_matches_oracle(out, call, batch, **oracle_options)


def counting_call(num_tokens=4, head_dim=32, cache_dtype=torch.float32, **changes):
    """One prefill sequence with zero queries and the values 1, 2, 3, ... ."""
    call = make_call(
        [(num_tokens, num_tokens)],
        num_tokens=num_tokens + 2,
        num_q_heads=1,
        num_kv_heads=1,
        head_dim=head_dim,
        cache_dtype=cache_dtype,
    )
    counts = torch.arange(1.0, num_tokens + 3)[:, None, None]
    return call._replace(
        q=torch.zeros_like(call.q), v=counts.expand_as(call.q), **changes
    )


def first_lane(out):
    return out[:, 0, 0].tolist()


def test_uniform_weights_give_means_of_the_visible_values():
    out = torch_rpa.ragged_paged_attention(*counting_call())
    # (1), (1+2)/2, (1+2+3)/3, (1+2+3+4)/4, then two padding rows
    assert first_lane(out) == [1.0, 1.5, 2.0, 2.5, 0.0, 0.0]


def test_sliding_window_keeps_the_last_positions():
    out = torch_rpa.ragged_paged_attention(*counting_call(), sliding_window=2)
    assert first_lane(out) == [1.0, 1.5, 2.5, 3.5, 0.0, 0.0]


def test_full_attention_sees_everything():
    out = torch_rpa.ragged_paged_attention(*counting_call(), causal=False)
    assert first_lane(out) == [2.5, 2.5, 2.5, 2.5, 0.0, 0.0]


def test_a_sink_is_one_more_key_with_a_zero_value():
    call = counting_call(sinks=torch.zeros(1))
    out = torch_rpa.ragged_paged_attention(*call)
    # 1/2, (1+2)/3, (1+2+3)/4, (1+2+3+4)/5
    torch.testing.assert_close(
        out[:, 0, 0], torch.tensor([0.5, 1.0, 1.5, 2.0, 0.0, 0.0])
    )


def test_soft_cap_limits_scores():
    call = counting_call(num_tokens=2)
    call.q.zero_()[:, 0, 0] = 100.0
    keys = torch.zeros_like(call.q)
    keys[1, 0, 0] = 1.0
    call = call._replace(k=keys)
    out = torch_rpa.ragged_paged_attention(*call, soft_cap=1.0)
    # Token 1 scores (0, 100), capped to (0, 1), on the values (1, 2).
    expected = (1.0 + 2.0 * math.e) / (1.0 + math.e)
    assert out[1, 0, 0].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        # 1000 / 2 is clipped to the largest finite value, -2.5 / 2 is rounded.
        (torch.float8_e4m3fn, [448.0, -1.25]),
        (torch.float8_e5m2, [512.0, -1.25]),
        (torch.int8, [127.0, -1.0]),
        (torch.bfloat16, [500.0, -1.25]),
        (torch.float32, [500.0, -1.25]),
    ],
)
def test_values_are_stored_scaled_and_clipped(dtype, stored):
    call = counting_call(num_tokens=2, cache_dtype=dtype)
    call = call._replace(
        v=torch.tensor([1000.0, -2.5, 0, 0])[:, None, None].expand_as(call.q)
    )
    out = torch_rpa.ragged_paged_attention(*call, v_scale=2.0)
    page = torch_rpa.unpack_kv_cache(call.kv_cache, 1, 32)[call.page_indices[0]]
    assert page[1, 0, :2, 0].float().tolist() == stored
    # Attention sees what is stored, times the scale.
    assert out[0, 0, 0].item() == 2.0 * stored[0]
    assert out[1, 0, 0].item() == stored[0] + stored[1]


def test_int8_rounds_half_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 200.0, -200.0])
    assert reference.encode(x, torch.int8, None).tolist() == [0, 2, 2, 0, -2, 127, -128]


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2, torch.int8])
def test_only_the_slots_of_new_tokens_change(head_dim, dtype):
    call = make_call(head_dim=head_dim, cache_dtype=dtype)
    call.kv_cache.view(torch.uint8).fill_(0x7F)  # NaN or 127 in every lane
    before = call.kv_cache.clone()
    torch_rpa.ragged_paged_attention(*call)
    heads = (2, head_dim)
    changed = (
        (
            torch_rpa.unpack_kv_cache(raw_cache(call.kv_cache), *heads)
            != torch_rpa.unpack_kv_cache(raw_cache(before), *heads)
        )
        .any(-1)
        .any(1)
        .any(1)
    )  # [N, page_size]
    table = call.page_indices.view(5, 4)
    new = {
        (int(table[seq, t // 8]), t % 8)
        for seq, (q_len, kv_len) in enumerate([(1, 13), (1, 8), (9, 9), (7, 30)])
        for t in range(kv_len - q_len, kv_len)
    }
    assert {(p, s) for p, s in changed.nonzero().tolist()} == new


def raw_cache(kv_cache):
    """The cache as int8, whose layout is that of every one-byte dtype."""
    if kv_cache.dtype.itemsize == 1:
        return kv_cache.view(torch.int8)
    return kv_cache.view(torch.int16).view(torch.bfloat16).nan_to_num(nan=7.0)


def test_lanes_of_no_head_are_written_as_zeros():
    call = make_call(head_dim=96, cache_dtype=torch.float32)
    call.kv_cache.fill_(float("nan"))
    torch_rpa.ragged_paged_attention(*call)
    rows = call.kv_cache.view(32, 4, 8, 128)
    written = ~rows[..., 0].isnan()
    assert written.any()
    assert (rows[written][:, 96:] == 0).all()


def test_dead_slots_may_hold_nan():
    clean, dirty = make_call(), make_call()
    expected = torch_rpa.ragged_paged_attention(*clean)
    live = torch.zeros(32, 8, dtype=torch.bool)
    table = dirty.page_indices.view(5, 4)
    for seq, kv_len in enumerate((13, 8, 9, 30)):
        for t in range(kv_len):
            live[table[seq, t // 8], t % 8] = True
    pages = torch_rpa.unpack_kv_cache(dirty.kv_cache, 2, 128)
    pages.masked_fill_(~live[:, None, None, :, None], float("nan"))
    out = torch_rpa.ragged_paged_attention(*dirty)
    assert torch.equal(out, expected)


def test_sequences_without_tokens_read_and_write_nothing():
    call = make_call([(1, 3), (0, 9), (0, 0), (4, 4)])
    alone = make_call([(1, 3), (0, 9), (0, 0), (4, 4)])
    call.page_indices.view(5, 4)[1:3] = -1
    out = torch_rpa.ragged_paged_attention(*call)
    expected = torch_rpa.ragged_paged_attention(*alone)
    assert torch.equal(out, expected)
    assert torch.equal(raw_bytes(call.kv_cache), raw_bytes(alone.kv_cache))


def test_query_blocks_do_not_change_the_result(monkeypatch):
    expected = torch_rpa.ragged_paged_attention(*make_call(), sliding_window=5)
    for module in (cpu, reference):  # two queries a block
        monkeypatch.setattr(module, "MAX_SCORES", 2 * 4 * 30)
    out = torch_rpa.ragged_paged_attention(*make_call(), sliding_window=5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_options_default_to_no_scaling():
    keys = torch.ones(1, 1, 32)
    out, _ = reference.attend(keys, keys, 3 * keys, None, AttentionOptions(), 1)
    assert torch.equal(out, 3 * keys)

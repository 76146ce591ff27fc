"""A cache that is striped over devices by token: each device in turn, on the CPU."""

from typing import Any

import pytest
import torch

import torch_rpa
from tests.torch_rpa.calls import make_call
from torch_rpa import context_parallel as cp

PAGE_SIZE, NUM_STRIPE_PAGES, NEW_PAGE_SIZE = 8, 32, 8
HEADS = 2, 128  # key heads, and their size


def striped_caches(call, lengths, num_devices):
    """The old tokens of a call, token t on device t % n; and the pages of stripes."""
    num_kv_heads, head_dim = HEADS
    whole = torch_rpa.unpack_kv_cache(call.kv_cache, num_kv_heads, head_dim)
    table = call.page_indices.view(len(call.kv_lens), -1)
    width = table.shape[1]
    pages = torch.randperm(
        NUM_STRIPE_PAGES, generator=torch.Generator().manual_seed(1)
    )[: len(lengths) * width].view(len(lengths), width)
    stripe_table = torch.full_like(table, -(2**31))
    stripe_table[: len(lengths)] = pages
    caches = []
    for device in range(num_devices):
        cache = torch.full_like(call.kv_cache, torch.nan)
        assert len(cache) == NUM_STRIPE_PAGES
        slots = torch_rpa.unpack_kv_cache(cache, num_kv_heads, head_dim)
        for s, (q_len, kv_len) in enumerate(lengths):
            for token in range(device, kv_len - q_len, num_devices):
                page, slot = divmod(token // num_devices, PAGE_SIZE)
                old_page, old_slot = divmod(token, PAGE_SIZE)
                slots[pages[s, page], :, :, slot] = whole[
                    table[s, old_page], :, :, old_slot
                ]
        caches.append(cache)
    return caches, stripe_table.reshape(-1)


def run(lengths, num_devices, sinks=False, **options):
    """The results of all devices merged, those of one cache, and their caches."""
    call: Any = make_call(
        lengths, page_size=PAGE_SIZE, cache_dtype=torch.float32, sinks=sinks
    )
    caches, pages = striped_caches(call, lengths, num_devices)
    step = cp.plan_striped_step(
        call.kv_lens,
        pages,
        call.cu_q_lens,
        call.distribution,
        num_devices=num_devices,
        num_tokens=len(call.q),
        new_page_size=NEW_PAGE_SIZE,
    )
    new_pages = cp.num_new_pages(len(call.q), len(call.kv_lens), NEW_PAGE_SIZE)
    new_cache = torch_rpa.empty_kv_cache(
        new_pages, NEW_PAGE_SIZE, *HEADS, dtype=torch.float32
    )
    parts = [
        cp.attend_to_stripe(
            call.q,
            call.k,
            call.v,
            cache,
            new_cache,
            step.of_device(d),
            call.sinks,
            **options,
        )
        for d, cache in enumerate(caches)
    ]
    merged = torch_rpa.merge_attention(*zip(*parts, strict=True))
    expected = torch_rpa.ragged_paged_attention(*call, return_lse=True, **options)
    after, _ = striped_caches(call, [(0, kv) for _, kv in lengths], num_devices)
    return merged, expected, caches, after


LENGTHS = {
    "decode": [(1, 13), (1, 1), (1, 8), (1, 30), (1, 32)],
    "prefill": [(9, 9), (13, 29)],
    "mixed": [(1, 13), (1, 2), (9, 9), (7, 30), (2, 3)],
    "nothing": [],
}


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_stripes_together_are_the_whole(lengths, num_devices):
    merged, expected, caches, after = run(lengths, num_devices, sm_scale=0.1)
    for got, right in zip(merged, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=2e-5, atol=2e-5)
    for cache, right in zip(caches, after, strict=True):
        assert torch.equal(cache.nan_to_num(), right.nan_to_num())


@pytest.mark.parametrize(
    ("sinks", "options"),
    [
        (True, {}),
        (False, {"soft_cap": 2.0}),
        (True, {"causal": False}),
        (False, {"decode_q_len": 2}),
    ],
    ids=str,
)
def test_options_act_on_all_parts(sinks, options):
    merged, expected, _, _ = run(LENGTHS["mixed"], 4, sinks, **options)
    for got, right in zip(merged, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=2e-5, atol=2e-5)


def test_the_example_of_the_module():
    step = cp.plan_striped_step(
        torch.tensor([10]).int(),
        torch.tensor([0]).int(),
        torch.tensor([0, 3]).int(),
        torch.tensor([0, 0, 1]).int(),
        num_devices=4,
        num_tokens=3,
        new_page_size=8,
    )
    assert step.own_kv_lens[:, 0].tolist() == [3, 3, 2, 2]
    assert (step.old_kv_lens[:, 0] - 3).tolist() == [2, 2, 2, 1]
    owned = [step.own_rows[d, : step.own_cu_q_lens[d, 1]].tolist() for d in range(4)]
    assert owned == [[1], [2], [], [0]]  # rows 0, 1, 2 are tokens 7, 8, 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sliding_window": 4}, "caches of such layers whole"),
        ({"attend": "new"}, "attend has no meaning"),
        ({"chunk_prefill_size": 4}, "chunk_prefill_size has no meaning"),
    ],
)
def test_what_stripes_cannot_do_is_named(options, message):
    with pytest.raises(NotImplementedError, match=message):
        run(LENGTHS["mixed"], 2, **options)


def test_lengths_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"cu_q_lens must .* got \[0, 5\] .* \[3\]"):
        cp.plan_striped_step(
            torch.tensor([3]).int(),
            torch.tensor([0]).int(),
            torch.tensor([0, 5]).int(),
            torch.tensor([0, 0, 1]).int(),
            num_devices=2,
            num_tokens=8,
            new_page_size=8,
        )

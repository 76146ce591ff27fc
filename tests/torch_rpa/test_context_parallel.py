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
        (True, {"k_scale": torch.tensor([0.5, 3.0]), "v_scale": torch.tensor(0.1)}),
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
        ({"batch_invariant": True}, "keep the cache whole"),
        ({"causal_block": 4}, "caches of such models whole"),
        ({"attend": "new"}, "attend has no meaning"),
        ({"chunk_prefill_size": 4}, "chunk_prefill_size has no meaning"),
        ({"return_lse": False}, "return_lse has no meaning"),
    ],
)
def test_what_stripes_cannot_do_is_named(options, message):
    with pytest.raises(NotImplementedError, match=message):
        run(LENGTHS["mixed"], 2, **options)


def plan(**changes):
    """A step of three sequences, 17 of 24 rows, on two devices."""
    arguments: dict[str, Any] = {
        "kv_lens": torch.tensor([13, 9, 30]).int(),
        "page_indices": torch.arange(12).int(),
        "cu_q_lens": torch.tensor([0, 1, 10, 17]).int(),
        "distribution": torch.tensor([1, 1, 3]).int(),
        "num_devices": 2,
        "num_tokens": 24,
        "new_page_size": 8,
    }
    for name, value in changes.items():
        is_list = isinstance(value, list)
        arguments[name] = torch.tensor(value).int() if is_list else value
    return cp.plan_striped_step(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_devices": 0}, "num_devices must be .* at least 1, got 0"),
        ({"num_tokens": 24.0}, "num_tokens must be a Python int"),
        ({"new_page_size": 12}, "new_page_size must be a power of two .* got 12"),
        ({"kv_lens": [[13, 9, 30]]}, r"kv_lens must be int32 .* got int32 \[1, 3\]"),
        ({"kv_lens": torch.ones(3)}, "kv_lens must be int32 .* got float32"),
        ({"kv_lens": (13, 9, 30)}, "kv_lens must be a tensor on the CPU, got tuple"),
        (
            {"cu_q_lens": torch.ones(4, device="meta")},
            "cu_q_lens must be a tensor on the CPU, got meta",
        ),
        ({"cu_q_lens": [0, 1, 10]}, r"cu_q_lens must be int32 \[4\], got int32 \[3\]"),
        ({"cu_q_lens": [5, 6, 10, 17]}, r"cu_q_lens\[0\] must be 0, got 5"),
        (
            {"cu_q_lens": [0, 1, 15, 17]},
            r"cu_q_lens must .* got \[0, 1, 15, 17\] .* \[13, 9, 30\]",
        ),
        ({"num_tokens": 16}, "cu_q_lens must .* num_tokens = 16"),
        ({"distribution": [1, 3]}, r"distribution must be int32 \[3\]"),
        ({"distribution": [2, 1, 3]}, r"distribution must satisfy .* got \[2, 1, 3\]"),
        ({"distribution": [1, 1, 9]}, r"distribution must satisfy .* k <= 3, got"),
        ({"page_indices": [1] * 11}, r"page_indices must .* S = 3, got \[11\]"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


@pytest.mark.parametrize("device", [-1, 2])
def test_a_device_that_is_not_there_is_refused(device):
    step = plan()
    with pytest.raises(ValueError, match=f"one of the 2 that .* got {device}"):
        step.of_device(device)
    with pytest.raises(ValueError, match="one of the 0 that"):
        step.of_device(0).of_device(0)


def attend(step, num_tokens=24, new_cache=None, **changes):
    """Attends with zeros to empty stripes; fails if an error comes after a write."""
    num_kv_heads, head_dim = HEADS
    if new_cache is None:
        new_cache = torch_rpa.empty_kv_cache(6, 8, *HEADS, dtype=torch.float32)
    kv_cache = torch_rpa.empty_kv_cache(12, 8, *HEADS, dtype=torch.float32)
    arguments: dict[str, Any] = {
        "q": torch.ones(num_tokens, 4, head_dim),
        "k": torch.ones(num_tokens, num_kv_heads, head_dim),
        "v": torch.ones(num_tokens, num_kv_heads, head_dim),
        "kv_cache": kv_cache,
        "new_cache": new_cache,
        "step": step,
    }
    try:
        return cp.attend_to_stripe(**arguments | changes)
    except ValueError:
        assert not kv_cache.any()
        raise


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": None, "v": None}, "k and v must be given"),
        ({"k": torch.ones(4, *HEADS)}, r"k must have shape .* got \[4, 2, 128\]"),
        ({"sinks": torch.ones(3)}, r"sinks must be float32 \[4\]"),
        ({"q": torch.ones(24, 3, 128)}, "q must have a multiple of the 2 key heads"),
        ({"num_tokens": 30}, "step must be planned for the 30 rows of q, got .* 24"),
        ({"num_tokens": 8}, "step must be planned for the 8 rows of q, got .* 24"),
        ({"step": plan()}, r"step must be that of one device, got that of 2"),
        ({"step": plan().of_device(0).to("meta")}, "step must be on the device of q"),
        (
            {"step": plan(new_page_size=16).of_device(0)},
            r"new_cache must be float32 \[4, 4, 16, 1, 128\], .* \[6, 4, 8, 1, 128\]",
        ),
        (
            {"new_cache": torch_rpa.empty_kv_cache(5, 8, *HEADS, dtype=torch.float32)},
            r"new_cache must be float32 \[6, .* got float32 \[5, ",
        ),
        (
            {"new_cache": torch_rpa.empty_kv_cache(6, 8, *HEADS)},
            "new_cache must be float32 .* got bfloat16",
        ),
        (
            {"step": plan(kv_lens=[13, 9, 70]).of_device(1)},
            r"kv_lens\[2\] must be in \[0, 32\] \(its row of page_indices\), got 35",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_a_step_is_named_before_a_write(changes, message):
    with pytest.raises(ValueError, match=message):
        attend(**{"step": plan().of_device(0)} | changes)


def test_gradients_of_stripes_are_refused():
    q = torch.ones(24, 4, 128, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no backward"):
        attend(plan().of_device(0), q=q)

"""What is refused, and that the message names the argument."""

import pytest
import torch

import torch_rpa
from tests.torch_rpa.calls import make_call, to_device
from torch_rpa import ops, validation
from torch_rpa.options import AttentionOptions
from torch_rpa.validation import Inputs

I32 = torch.int32


def i32(*values):
    return torch.tensor(values, dtype=I32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(24, 4)}, ValueError, r"q must have shape \[T, Hq, D\]"),
        ({"q": torch.zeros(24, 4, 600)}, NotImplementedError, "head_dim 600 .*; use"),
        ({"k": None, "v": None}, ValueError, "pass update_kv_cache=False"),
        ({"sinks": torch.zeros(4).half()}, ValueError, "sinks must be float32"),
        (
            {"q": torch.zeros(24, 4, 128, dtype=torch.float16)},
            NotImplementedError,
            "q of float16 .* cast",
        ),
        (
            {"k": torch.zeros(24, 2, 128, device="meta")},
            ValueError,
            "k must be on the device of q",
        ),
    ],
)
def test_arguments_are_checked_by_the_contract(changes, error, message):
    call = make_call()._replace(**changes)
    with pytest.raises(error, match=message):
        validation.validate_static(Inputs(*call), AttentionOptions())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_cache_that_is_not_contiguous_is_refused(device):
    call = to_device(make_call(), device)
    other_order = call.kv_cache.transpose(1, 2).contiguous().transpose(1, 2)
    call = call._replace(kv_cache=other_order)
    for operator in (ops.ragged_paged_attention, ops.ragged_paged_attention_functional):
        with pytest.raises(ValueError, match="kv_cache must be contiguous"):
            operator(*call)
    with pytest.raises(ValueError, match="kv_cache must be contiguous"):
        torch_rpa.ragged_paged_attention(*call, impl="pallas_interpret")


def test_metadata_may_be_views():
    call, expected_call = make_call(), make_call()
    wide = torch.stack([call.page_indices, call.page_indices], dim=1)
    out = ops.ragged_paged_attention(*call._replace(page_indices=wide[:, 0]))
    assert torch.equal(out, ops.ragged_paged_attention(*expected_call))


@pytest.mark.parametrize("impl", [None, "pallas_interpret"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page": -1}, r"\(page 0 of sequence 3\) must be in \[0, 32\), got -1"),
        ({"page": 32}, r"\(page 0 of sequence 3\) must be in \[0, 32\), got 32"),
        ({"kv_lens": i32(13, 8, 9, 6, 0)}, r"kv_lens\[3\] must count the new tokens"),
        ({"kv_lens": i32(13, 8, 9, 33, 0)}, r"kv_lens\[3\] must be in \[0, 32\]"),
        ({"distribution": i32(2, 2, 6)}, "distribution must satisfy"),
        ({"cu_q_lens": i32(0, 1, 2, 11, 25, 0)}, "cu_q_lens.* at most the 24 tokens"),
    ],
)
def test_numbers_out_of_range_on_cpu_tensors_are_refused_before_a_write(
    changes, message, impl
):
    call = make_call()
    changes = dict(changes)
    if "page" in changes:
        call.page_indices[3 * 4] = changes.pop("page")
    call = call._replace(**changes)
    before = call.kv_cache.clone()
    with pytest.raises(ValueError, match=message):
        torch_rpa.ragged_paged_attention(*call, impl=impl)
    assert torch.equal(call.kv_cache, before)


def test_values_that_clash_are_refused_on_request():
    call = make_call([(1, 9), (1, 10)])
    table = call.page_indices.view(5, 4)
    table[1, 0] = table[0, 0]
    validation.validate_values(Inputs(*call), AttentionOptions())
    table[1, 1] = table[0, 1]
    with pytest.raises(ValueError, match=r"slot 0 of page .* which sequence 0 writes"):
        validation.validate_values(Inputs(*call), AttentionOptions())


@pytest.mark.parametrize(
    ("word", "meaning"),
    [
        *[(word, False) for word in ("", "0", "false", "No", "OFF", " off ")],
        *[(word, True) for word in ("1", "true", "Yes", "ON")],
    ],
)
def test_usual_words_switch_the_checks_of_values(monkeypatch, word, meaning):
    monkeypatch.setenv(validation.VALIDATE_ENV, word)
    assert validation.values_requested() == meaning


def test_a_word_that_is_neither_on_nor_off_is_refused(monkeypatch):
    monkeypatch.setenv(validation.VALIDATE_ENV, "maybe")
    with pytest.raises(ValueError, match=r"RPA_VALIDATE must be one of .*'maybe'"):
        torch.ops.rpa.ragged_paged_attention(*make_call())


def test_values_are_checked_on_request_and_by_environment(monkeypatch):
    call = make_call()._replace(distribution=i32(3, 3, 4))
    with pytest.raises(ValueError, match="distribution puts sequence 2"):
        torch_rpa.ragged_paged_attention(*call, validate=True)
    monkeypatch.setenv(validation.VALIDATE_ENV, "1")
    with pytest.raises(ValueError, match="distribution puts sequence 2"):
        torch.ops.rpa.ragged_paged_attention(*call)
    monkeypatch.setenv(validation.VALIDATE_ENV, "0")
    torch.ops.rpa.ragged_paged_attention(*call)

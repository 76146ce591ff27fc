"""What is refused, and that the message names the argument."""

import pytest
import torch

import torch_rpa
from tests.torch_rpa.calls import make_call
from torch_rpa import validation
from torch_rpa.options import AttentionOptions

I32 = torch.int32


def i32(*values):
    return torch.tensor(values, dtype=I32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(24, 4)}, r"q must have shape \[T, Hq, D\]"),
        ({"q": torch.zeros(24, 4, 128, dtype=torch.float16)}, "q must have one of"),
        ({"q": torch.zeros(24, 3, 128)}, "multiple of the 2 heads"),
        ({"q": torch.zeros(24, 4, 264)}, "head_dim must be from 32 to 256"),
        ({"k": torch.zeros(23, 2, 128)}, r"k must be .* \[24, 2, 128\], got"),
        ({"v": torch.zeros(24, 2, 128, dtype=torch.bfloat16)}, "v must be torch.float"),
        ({"k": None}, "k must be a tensor, got None; pass update_kv_cache=False"),
        ({"kv_cache": torch.zeros(4, 4, 8, 128)}, "kv_cache of .* must have shape"),
        ({"kv_cache": torch.zeros(4, 4, 8, 2, 128)}, r"1, 128\], got \[4, 4, 8, 2"),
        ({"kv_cache": torch.zeros(4, 4, 12, 1, 128)}, "page_size must be a power"),
        ({"kv_cache": torch.zeros(4, 3, 8, 1, 128)}, "kv_cache of .* 2 \\* Hkv"),
        ({"kv_lens": torch.zeros(5, dtype=torch.int64)}, "kv_lens must be torch.int32"),
        ({"kv_lens": torch.zeros(5, 1, dtype=I32)}, r"kv_lens must have shape \[S\]"),
        ({"page_indices": torch.zeros(21, dtype=I32)}, r"page_indices must .* S = 5"),
        ({"page_indices": torch.zeros(5, 4, dtype=I32)}, "page_indices must have"),
        ({"cu_q_lens": torch.zeros(5, dtype=I32)}, r"cu_q_lens must be .* \[6\], got"),
        ({"distribution": torch.zeros(2, dtype=I32)}, r"distribution must be .* \[3\]"),
        ({"sinks": torch.zeros(2)}, r"sinks must be torch.float32 \[4\], got"),
        ({"sinks": torch.zeros(4, dtype=torch.bfloat16)}, "sinks must be torch.float"),
        ({"k": torch.zeros(24, 2, 128, device="meta")}, "k must be on the device of q"),
    ],
)
def test_static_errors_name_the_argument(changes, message):
    call = make_call()._replace(**changes)
    with pytest.raises(ValueError, match=message):
        validation.validate_static(call, AttentionOptions())


def test_q_scale_needs_a_quantised_cache():
    options = AttentionOptions(q_scale=0.5)
    with pytest.raises(ValueError, match="q_scale must be None unless kv_cache"):
        validation.validate_static(make_call(), options)
    validation.validate_static(make_call(cache_dtype=torch.int8), options)


def test_keys_and_values_may_be_missing_if_nothing_is_written():
    call = make_call()._replace(k=None, v=None)
    validation.validate_static(call, AttentionOptions(update_kv_cache=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distribution": i32(2, 1, 4)}, "distribution must satisfy"),
        ({"distribution": i32(2, 2, 6)}, "distribution must satisfy"),
        ({"distribution": i32(3, 3, 4)}, "among the decode ones: .* 1 new tok.* got 9"),
        ({"cu_q_lens": i32(1, 2, 3, 11, 18, 0)}, r"cu_q_lens\[0\] must be 0, got 1"),
        ({"cu_q_lens": i32(0, 1, 2, 1, 8, 0)}, "cu_q_lens must not decrease"),
        ({"cu_q_lens": i32(0, 1, 2, 11, 41, 0)}, "cu_q_lens.* at most the 24 tokens"),
        ({"kv_lens": i32(13, 8, 8, 30, 0)}, r"kv_lens\[2\] must count the new tokens"),
        ({"kv_lens": i32(33, 8, 9, 30, 0)}, r"kv_lens\[0\] must be in \[0, 32\]"),
        ({"kv_lens": i32(-1, 8, 9, 30, 0)}, r"kv_lens\[0\] must be in"),
        ({"page_indices": i32(*range(14), 32, *range(15, 20))}, r"page_indices\[14\]"),
        ({"page_indices": i32(*[0] * 20)}, "page_indices must give each new token its"),
    ],
)
def test_value_errors_name_the_argument(changes, message):
    call = make_call()
    validation.validate_values(call, AttentionOptions())
    with pytest.raises(ValueError, match=message):
        validation.validate_values(call._replace(**changes), AttentionOptions())


def test_a_chunk_of_another_size_is_refused():
    call = make_call([(1, 5), (4, 4), (5, 9)])._replace(distribution=i32(1, 3, 3))
    validation.validate_values(call, AttentionOptions())
    with pytest.raises(ValueError, match=r"among the prefill ones: .* 4 new .* got 5"):
        validation.validate_values(call, AttentionOptions(chunk_prefill_size=4))


def test_sequences_may_share_pages_that_neither_writes():
    call = make_call([(1, 9), (1, 10)])
    table = call.page_indices.view(5, 4)
    table[1, 0] = table[0, 0]
    validation.validate_values(call, AttentionOptions())
    table[1, 1] = table[0, 1]  # slots 0 and 1 of the same page: still apart
    validation.validate_values(call, AttentionOptions())


def test_values_are_checked_on_request_and_by_environment(monkeypatch):
    call = make_call()._replace(kv_lens=i32(33, 8, 9, 24, 0))
    with pytest.raises(ValueError, match=r"kv_lens\[0\] must be in"):
        torch_rpa.ragged_paged_attention(*call, validate=True)
    monkeypatch.setenv(validation.VALIDATE_ENV, "1")
    with pytest.raises(ValueError, match=r"kv_lens\[0\] must be in"):
        torch.ops.rpa.ragged_paged_attention(*call)
    monkeypatch.setenv(validation.VALIDATE_ENV, "0")
    assert not validation.values_requested()

"""A prefix that sequences share is read once."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_rpa
from tests.torch_rpa.calls import Call, make_call, raw_bytes, to_device

PREFIX_LEN = 16  # two pages
LENGTHS = [(1, 29), (1, 17), (3, 25), (5, 21)]


def make_cascade(lengths=LENGTHS, **arguments) -> tuple[Call, Call, dict[str, Any]]:
    """A call whose sequences share two pages, and the arguments of its cascade."""
    call = make_call(lengths, **arguments)
    table = call.page_indices.view(5, -1)
    table[: len(lengths), :2] = table[0, :2]
    parts = call._replace(
        kv_cache=call.kv_cache.clone(),
        kv_lens=call.kv_lens - PREFIX_LEN,
        page_indices=table[:, 2:].reshape(-1).clone(),
    )
    return (
        call,
        parts,
        {
            "prefix_len": torch.tensor([PREFIX_LEN]).int(),
            "prefix_page_indices": table[0, :2].clone(),
        },
    )


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"cache_dtype": torch.float32}, {}),
        ({"sinks": True, "head_dim": 64}, {"soft_cap": 3.0}),
        ({"cache_dtype": torch.float8_e4m3fn}, {"k_scale": 0.5, "v_scale": 0.3}),
        ({"num_q_heads": 6}, {"decode_q_len": 3, "chunk_prefill_size": 5}),
        (
            {"cache_dtype": torch.int8},
            {"k_scale": torch.tensor([0.02, 0.03]), "v_scale": torch.tensor(0.03)},
        ),
    ],
    ids=str,
)
def test_a_cascade_is_attention_to_prefix_and_rest(arguments, options):
    call, parts, prefix = make_cascade(**arguments)
    options = {"sm_scale": 0.1, "return_lse": True, **options}
    expected = torch_rpa.ragged_paged_attention(*call, **options)
    got = torch_rpa.cascade_attention(*parts, **prefix, **options)
    assert_same(got, expected)
    assert torch.equal(raw_bytes(parts.kv_cache), raw_bytes(call.kv_cache))


def test_without_logarithms_and_without_a_live_sequence():
    call, parts, prefix = make_cascade()
    expected = torch_rpa.ragged_paged_attention(*call)
    assert_same([torch_rpa.cascade_attention(*parts, **prefix)], [expected])
    _, parts, prefix = make_cascade([])
    assert not torch_rpa.cascade_attention(*parts, **prefix).any()


def test_more_queries_than_the_prefix_has_tokens():
    lengths = [(1, 29), (12, 28), (10, 26)]
    call, parts, prefix = make_cascade(lengths, cache_dtype=torch.float32)
    expected = torch_rpa.ragged_paged_attention(*call)
    got = torch_rpa.cascade_attention(*parts, **prefix, validate=True)
    assert_same([got], [expected])


def test_fake_tensors_have_no_values_to_check():
    _, parts, prefix = make_cascade()
    mode = FakeTensorMode()
    fakes: Any = [None if x is None else mode.from_tensor(x) for x in parts]
    fake_prefix = {name: mode.from_tensor(x) for name, x in prefix.items()}
    out = torch_rpa.cascade_attention(*fakes, **fake_prefix)
    assert out.shape == parts.q.shape


@pytest.mark.extended
def test_the_kernel_computes_a_cascade():
    call, parts, prefix = make_cascade(cache_dtype=torch.float32)
    expected = torch_rpa.ragged_paged_attention(*call)
    got = torch_rpa.cascade_attention(*parts, **prefix, impl="pallas_interpret")
    assert_same([got], [expected])
    assert torch.equal(parts.kv_cache, call.kv_cache)


@pytest.mark.slow
@pytest.mark.torch_xla
def test_a_cascade_in_one_graph():
    import torch_xla

    call, parts, prefix = make_cascade(cache_dtype=torch.float32)
    expected = torch_rpa.ragged_paged_attention(*call)
    parts = to_device(parts, torch_xla.device())
    prefix = {name: tensor.to(torch_xla.device()) for name, tensor in prefix.items()}
    got = torch_rpa.cascade_attention(*parts, **prefix)
    torch_xla.sync()
    assert_same([got.cpu()], [expected])
    assert torch.equal(parts.kv_cache.cpu(), call.kv_cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sliding_window": 9}, "sliding_window is not supported .*page table"),
        ({"batch_invariant": True}, "batch_invariant is not supported .*ragged_paged"),
        ({"causal_block": 8}, "causal_block is not supported .*page table"),
        ({"attend": "new"}, "attend must be 'all'"),
    ],
)
def test_what_a_cascade_cannot_do_is_named(options, message):
    _, parts, prefix = make_cascade()
    with pytest.raises(NotImplementedError, match=message):
        torch_rpa.cascade_attention(*parts, **prefix, **options)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("prefix_len", lambda x: x.long(), r"int32 \[1\], got int64 \[1\]"),
        ("prefix_len", lambda x: x.repeat(2), r"int32 \[1\], got int32 \[2\]"),
        ("prefix_len", lambda x: x[0], r"int32 \[1\], got int32 \[\]"),
        ("prefix_len", lambda x: 16, r"a tensor int32 \[1\], got 16"),
        ("prefix_len", lambda x: x + 1, r"in \[0, 16\] .* got 17"),
        ("prefix_len", lambda x: -x, r"in \[0, 16\] .* got -16"),
        ("prefix_page_indices", lambda x: x.long(), r"\[P0\], got int64 \[2\]"),
        ("prefix_page_indices", lambda x: x[:0], r"\[P0\], got int32 \[0\]"),
        ("prefix_page_indices", lambda x: x.to("meta"), "device of q, cpu, got meta"),
        ("prefix_page_indices", lambda x: x - 99, r"in \[0, 32\), got -"),
        ("prefix_page_indices", lambda x: 0 * x + 3, "once, got page 3 at 0 and at 1"),
    ],
)
def test_what_is_wrong_with_a_prefix_is_named(name, change, message):
    _, parts, prefix = make_cascade()
    before = parts.kv_cache.clone()
    with pytest.raises(ValueError, match=f"{name}.* must .*{message}"):
        torch_rpa.cascade_attention(*parts, **prefix | {name: change(prefix[name])})
    assert torch.equal(parts.kv_cache, before)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("distribution", lambda x: x + 99, "distribution must satisfy 0 <= i"),
        ("distribution", lambda x: x[:2], r"distribution must be int32 \[3\]"),
        ("cu_q_lens", lambda x: x.long(), r"cu_q_lens must be int32 \[6\]"),
        ("cu_q_lens", lambda x: None, "cu_q_lens must be given"),
        ("kv_lens", lambda x: 0 * x + 99, r"kv_lens\[0\] must be in \[0, 16\]"),
    ],
)
def test_what_is_wrong_with_the_rest_is_named(name, change, message):
    _, parts, prefix = make_cascade()
    parts = parts._replace(**{name: change(getattr(parts, name))})
    with pytest.raises(ValueError, match=message):
        torch_rpa.cascade_attention(*parts, **prefix)

"""Parts of the keys, joined again: two parts, three parts, parts without keys."""

import math

import pytest
import torch

import torch_rpa
from tests.torch_rpa.calls import make_call

LENGTHS = [(1, 13), (1, 1), (9, 9), (7, 30)]


def attend(call, **options):
    return torch_rpa.ragged_paged_attention(
        *call, sm_scale=0.1, return_lse=True, **options
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 5}, {"causal": False}, {"soft_cap": 2.0}],
    ids=str,
)
def test_keys_of_the_cache_and_new_keys_are_all_keys(options):
    arguments = {"cache_dtype": torch.float32, "sinks": True}
    whole = attend(make_call(LENGTHS, **arguments), **options)
    call = make_call(LENGTHS, **arguments)
    old = attend(call._replace(sinks=None), attend="cache", **options)
    new = attend(call, attend="new", update_kv_cache=False, **options)
    merged = torch_rpa.merge_attention(*zip(old, new, strict=True))
    for got, expected in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_weights_are_shares_of_the_sum():
    outs = [torch.full((1, 4), value) for value in (1.0, 5.0, 9.0)]
    lses = [torch.tensor([math.log(weight)]) for weight in (1.0, 2.0, 1.0)]
    out, lse = torch_rpa.merge_attention(outs, lses)
    torch.testing.assert_close(out, torch.full((1, 4), 5.0))
    torch.testing.assert_close(lse, torch.tensor([math.log(4.0)]))


def test_infinite_logarithms():
    infinity = math.inf
    outs = [torch.tensor([[2.0], [0.0], [0.0], [3.0]]), torch.zeros(4, 1)]
    lses = [
        torch.tensor([1.0, -infinity, -infinity, 1.0]),
        torch.tensor([-infinity, -infinity, infinity, infinity]),
    ]
    out, lse = torch_rpa.merge_attention(outs, lses)
    assert out[:, 0].tolist() == [2.0, 0.0, 0.0, 0.0]
    assert lse.tolist() == [1.0, -infinity, infinity, infinity]


def test_outputs_keep_their_dtype():
    outs = [torch.ones(2, 3, 4, dtype=torch.bfloat16)] * 2
    out, lse = torch_rpa.merge_attention(outs, [torch.zeros(2, 3)] * 2)
    assert out.dtype == torch.bfloat16 and torch.equal(out, outs[0])
    torch.testing.assert_close(lse, torch.full((2, 3), math.log(2.0)))


def test_parts_may_be_stacked_or_generated():
    outs, lses = torch.randn(2, 3, 4), torch.randn(2, 3)
    expected = torch_rpa.merge_attention(list(outs), list(lses))
    for got in (
        torch_rpa.merge_attention(outs, lses),
        torch_rpa.merge_attention(iter(outs), iter(lses)),
    ):
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_gradients_are_those_of_a_softmax_also_of_equal_parts():
    outs = torch.randn(2, 2, 3)
    lses = torch.tensor([[0.5, 0.5], [0.5, 2.0]], requires_grad=True)
    out, lse = torch_rpa.merge_attention(outs, lses)
    plain = (torch.softmax(lses, 0).unsqueeze(-1) * outs).sum(dim=0)
    got, expected = (
        torch.autograd.grad(a.sum() + 2 * b.sum(), lses)[0]
        for a, b in ((out, lse), (plain, lses.logsumexp(0)))
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float64], ids=str)
def test_parts_of_other_dtypes_are_refused(dtype):
    with pytest.raises(NotImplementedError, match=f"outs of {dtype} .* cast them"):
        torch_rpa.merge_attention([torch.ones(2, 4, dtype=dtype)], [torch.ones(2)])


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "at least one, got 0 and 0"),
        ([torch.ones(2, 4)], [], "got 1 and 0"),
        (
            [torch.ones(2, 4), torch.ones(3, 4)],
            [torch.ones(2), torch.ones(3)],
            r"outs\[1\] must be torch.float32 \[2, 4\] as outs\[0\], got .* \[3, 4\]",
        ),
        (
            [torch.ones(2, 4)],
            [torch.ones(2).double()],
            r"lses\[0\] must be torch.float32 \[2\], got torch.float64",
        ),
        ([torch.ones(2, 4)], [torch.ones(2, 1)], r"lses\[0\] must be .* \[2\], got"),
        ([torch.ones(())], [torch.ones(())], r"outs\[0\] must have shape \[..., D\]"),
        (
            [torch.ones(2, 4)],
            [torch.ones(2, device="meta")],
            r"lses\[0\] must be on the device of outs\[0\], cpu, got meta",
        ),
    ],
)
def test_what_does_not_fit_is_named(outs, lses, message):
    with pytest.raises(ValueError, match=message):
        torch_rpa.merge_attention(outs, lses)

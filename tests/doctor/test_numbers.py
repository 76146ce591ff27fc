"""What is compared would show a fault, and the batches are what they say."""

import pytest
import torch

import torch_rpa
from torch_rpa.doctor import batches, numbers
from torch_rpa.doctor.checks import Status

CASES = [(kind, dtype) for kind in batches.KINDS for dtype in batches.SCALES]


@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=str)
def test_a_batch_is_valid(kind, dtype):
    inputs = batches.make(batches.KINDS[kind], dtype)
    torch_rpa.ragged_paged_attention(
        *batches.moved(inputs, torch.device("cpu")).positional,
        **batches.options_of(dtype),
        validate=True,
    )


def test_each_kind_has_its_phase():
    ranges = {
        name: batches.make(kind, torch.bfloat16).distribution.tolist()
        for name, kind in batches.KINDS.items()
    }
    assert ranges == {"decode": [6, 6, 6], "prefill": [0, 3, 3], "mixed": [2, 3, 5]}


def test_quantised_caches_use_their_range():
    """Otherwise a scale that is forgotten would hardly be seen."""
    for dtype, scale in batches.SCALES.items():
        stored = batches.filled_cache(dtype, batches.NUM_PAGES).float().abs()
        assert scale is None or stored.max() > 32


@pytest.fixture(scope="module")
def call():
    inputs = batches.make(batches.KINDS["mixed"], torch.bfloat16)
    options = batches.options_of(torch.bfloat16)
    return inputs, options, numbers.expected(inputs, options)


def faulty(call, change):
    """Compares the reference's own result after a change."""
    inputs, options, wanted = call
    kv_cache = inputs.kv_cache.clone()
    tensors = inputs._replace(kv_cache=kv_cache)
    out = torch_rpa.ragged_paged_attention(*tensors.positional, **options)
    change(out, kv_cache)
    return numbers.verdict("name", numbers.compare(out, kv_cache, wanted))


def test_the_result_itself_is_right(call):
    assert faulty(call, lambda out, cache: None).status is Status.OK


FAULTS = {
    "a row of another sequence": lambda out, cache: out[3].copy_(out[4]),
    "a head of another one": lambda out, cache: out[:, 0].copy_(out[:, 1]),
    "off by 3 %": lambda out, cache: out.mul_(1.03),
    "not a number": lambda out, cache: out[2, 1, 5].fill_(torch.nan),
    "padding that is not zero": lambda out, cache: out[-1, -1, -1].fill_(1e-30),
    "zeros": lambda out, cache: out.zero_(),
}


@pytest.mark.parametrize("change", FAULTS.values(), ids=FAULTS)
def test_a_wrong_output_is_seen(call, change):
    check = faulty(call, change)
    assert check.status is Status.FAILED
    assert check.figures["error"] > 1 and not check.figures["wrong_bytes"]


def test_a_wrong_byte_of_the_cache_is_seen(call):
    check = faulty(
        call, lambda out, cache: cache.view(torch.uint8)[-1, -1, -1, -1, -1:].add_(1)
    )
    assert check.status is Status.FAILED
    assert check.figures["wrong_bytes"] == 1

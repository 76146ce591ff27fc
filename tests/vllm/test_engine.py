"""vLLM serves with the operator, in processes of their own; see engine_cases.py."""

import functools
import itertools

import pytest

from tests.support import child_results

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PREFIX_HITS = [0, 16, 32, 48, 0, 96]  # whole pages of the prompts

result_of = functools.cache(
    functools.partial(child_results.result_of, "tests.vllm.engine_cases")
)

FAMILIES = {  # the shape of a cache of 128 pages of 16 tokens in float32
    "llama": [128, 4, 16, 1, 128],
    "qwen3": [128, 2, 16, 1, 128],  # a key beside its value
    "gemma3_text": [128, 4, 16, 1, 128],
    "gpt_oss": [128, 2, 16, 1, 128],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prompts_get_the_tokens_of_transformers(family):
    result = result_of(family)
    assert result["backend"] == "RpaModelRunner"
    assert result["cache"] == FAMILIES[family]
    assert result["first"] == result["expected"]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_whose_beginning_is_in_the_cache_get_them_too(family):
    result = result_of(family)
    assert result["cached"] == PREFIX_HITS
    assert result["again"] == result["expected"]


@pytest.mark.parametrize("family", FAMILIES)
def test_cancelled_requests_leave_others_alone(family):
    result = result_of(family)
    assert result["cancelled"] == result["expected"][::2]


def test_requests_that_are_taken_out_for_lack_of_pages_are_computed_again():
    result = result_of("preempt")
    assert result["preempted"] > 0
    assert result["first"] == result["expected"]


def test_a_float8_cache_has_the_scales_of_the_checkpoint():
    result = result_of("float8")
    assert result["dtype"] == "torch.float8_e4m3fn"
    # Both compute in float32, in another order. Where a key lies between two numbers of
    # 8 bits, the last bit decides, and later tokens may be others.
    assert share_in_common(result["first"], result["expected"]) > 0.8
    assert share_in_common(result["first"], result["unquantised"]) < 0.5


def share_in_common(texts, others):
    """The share of tokens before the first one that differs, of all texts together."""
    same = 0
    for text, other in zip(texts, others, strict=True):
        pairs = zip(text, other, strict=True)
        same += sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
        )
    return same / sum(len(text) for text in texts)


def test_heads_are_sharded_over_devices():
    result = result_of("spmd")
    assert "devices=[1,2,1,1,1]" in result["sharding"]
    assert result["cached"] == PREFIX_HITS
    assert result["first"] == result["expected"] == result["again"]


def test_the_server_answers_at_once_and_in_a_stream():
    result = result_of("server")
    assert result["first"] == result["expected"] == result["streamed"]
    assert result["events"] > 5
    assert "presence_penalty must be left out" in result["refused"]

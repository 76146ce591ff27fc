"""Hundreds of random requests: tokens of one-by-one generation, and no page astray."""

import pytest

from tests.serving.faults import Faults
from tests.serving.traffic import check, random_traffic, run
from tests.support.tiny_llama import build_llama
from tests.support.tiny_mistral import build_mistral
from torch_rpa.generate.tokenizer import ByteTokenizer
from torch_rpa.serving import Engine, EngineOptions, RequestStatus
from torch_rpa.validation import VALIDATE_ENV


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "keywords"),
    [
        (0, {}),
        (1, {"num_pages": 14}),  # 7 for the longest: preemptions
        (2, {"num_pages": 14, "lookahead": False}),
        (3, {"prefix_caching": False, "max_tokens_per_step": 8}),
        (4, {"num_pages": 20, "max_tokens_per_step": 100, "page_size": 16}),
    ],
)
def test_tokens_equal_generation_one_by_one(eager, paged, seed, keywords, monkeypatch):
    monkeypatch.setenv(VALIDATE_ENV, "1")  # the operator checks all metadata as well
    options = {
        "max_num_sequences": 6,
        "max_tokens_per_step": 24,
        "max_sequence_length": 96,
        "page_size": 8,
        "device": "cpu",
        **keywords,
    }
    engine = Engine(paged, EngineOptions(**options))
    traffic = random_traffic(seed, 100, too_long=(17, 50))
    outputs, audit = run(engine, traffic)
    check(eager, traffic, outputs)
    statuses = [output.status for output in outputs]
    failed = [i for i, s in enumerate(statuses) if s == RequestStatus.FAILED]
    assert failed == [17, 50]
    assert "must be at most 96 together" in outputs[17].error
    # Some were too late: the request had ended.
    cancelled = {i for i, s in enumerate(statuses) if s == RequestStatus.CANCELLED}
    assert cancelled and cancelled <= traffic.cancelled.keys()
    stats = engine.stats
    assert stats.num_generated == sum(len(o.generated_tokens) for o in outputs)
    assert (stats.num_preemptions > 0) == (options.get("num_pages") == 14)
    assert (audit.num_foreign_reads > 0) == options.get("prefix_caching", True)
    assert (stats.num_shared_tokens > 0) == options.get("prefix_caching", True)
    assert (stats.num_surplus > 0) == options.get("lookahead", True)
    assert stats.peak_pages_held <= engine.scheduler.allocator.num_pages


@pytest.mark.slow
@pytest.mark.parametrize("build", [build_llama, build_mistral])
@pytest.mark.parametrize(
    ("seed", "count", "keywords"),
    [
        (10, 60, {}),
        (11, 60, {"num_pages": 14, "lookahead": False}),
        *(
            pytest.param(seed, 1400, keywords, marks=pytest.mark.extended)
            for seed, keywords in enumerate(
                ({}, {"num_pages": 14}, {"lookahead": False}, {"prefix_caching": False})
            )
        ),
    ],
)
def test_steps_that_raise_hurt_no_other_request(build, seed, count, keywords):
    """With and without windows, and whatever the requests ask for."""
    pytest.importorskip("llguidance")
    options = {
        "max_num_sequences": 6,
        "max_tokens_per_step": 24,
        "max_sequence_length": 96,
        "page_size": 8,
        "device": "cpu",
        **keywords,
    }
    engine = Engine(build("rpa"), EngineOptions(**options), tokenizer=ByteTokenizer())
    faults = Faults(engine, seed)
    traffic = random_traffic(seed, count, wish_share=0.4)
    outputs, _ = run(engine, traffic)
    check(build("eager"), traffic, outputs)
    failed = [o for o in outputs if o.status == RequestStatus.FAILED]
    # Some come through a library that was calling back, as part of its own error.
    others = [o.error for o in failed if "InjectedFault" not in o.error]
    assert not others
    # A fault at random fails a request only if its step has no other.
    assert engine.stats.num_failed_steps > len(failed)
    assert len(failed) < count // 2
    assert sum(number > 0 for number in faults.places.values()) > 15
    assert engine.stats.num_steps > 2 * count  # the long cases are 22,400 and more

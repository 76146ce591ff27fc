"""On an XLA device: few programs, nothing on the CPU, one wait in a step."""

import dataclasses
from typing import Any

import pytest

from tests.serving.traffic import check, random_traffic, run
from torch_rpa.serving import Engine, EngineOptions, RequestStatus, SamplingParams

# All of them need the programs of an engine.
pytestmark = [pytest.mark.slow, pytest.mark.torch_xla]

OPTIONS = EngineOptions(
    max_num_sequences=5,
    max_tokens_per_step=24,
    max_sequence_length=96,
    page_size=8,
    num_pages=13,  # shapes of its own, so that no other test has compiled them
)
PROMPTS = [[7] * 3, [8] * 20, [9] * 9, [7] * 3]
PARAMS = [
    SamplingParams(max_new_tokens=6),
    SamplingParams(max_new_tokens=9, temperature=1.0, top_k=9, seed=1),
    SamplingParams(max_new_tokens=12),
    SamplingParams(max_new_tokens=8, eos_token_ids=(5,)),
]


@pytest.fixture(scope="module")
def engine(paged_on_xla):
    engine = Engine(paged_on_xla, OPTIONS)
    engine.warm_up()
    return engine


def test_warming_up_compiles_all_programs_and_serving_none(engine, paged_on_xla):
    # Buckets of 8 and 24 tokens, each greedy and sampling, and the caches.
    assert engine.stats.num_compilations == engine.stats.max_compilations == 5
    first = engine.generate_batch(PROMPTS, PARAMS)
    assert engine.stats.num_compilations == 5
    second = Engine(paged_on_xla, OPTIONS)  # the programs are known by now
    results = second.generate_batch(PROMPTS, PARAMS)
    assert second.stats.num_compilations == 0
    assert [o.generated_tokens for o in results.values()] == [
        o.generated_tokens for o in first.values()
    ]


def test_a_step_runs_one_program_and_waits_once_and_leaves_nothing_to_the_cpu(engine):
    import torch_xla.debug.metrics as metrics

    def count(name):
        data = metrics.metric_data(name)
        return data[0] if data else 0

    names = ("ExecuteTime", "TransferFromDeviceTime")
    metrics.clear_counters()
    before, steps = [count(name) for name in names], engine.stats.num_steps
    engine.generate_batch(PROMPTS, PARAMS)
    num_steps = engine.stats.num_steps - steps
    assert num_steps > 10
    assert [count(n) - b for n, b in zip(names, before, strict=True)] == [
        num_steps,
        num_steps,
    ]
    assert [name for name in metrics.counter_names() if name.startswith("aten::")] == []


def test_tokens_reach_the_host_after_the_next_step_has_started(engine, monkeypatch):
    events = []
    start, finish = Engine._start, Engine._finish

    def log_start(self, flight):
        events.append("start")
        return start(self, flight)

    def log_finish(self, flight):
        events.append("finish")
        return finish(self, flight)

    monkeypatch.setattr(Engine, "_start", log_start)
    monkeypatch.setattr(Engine, "_finish", log_finish)
    engine.generate_batch([[3]], SamplingParams(max_new_tokens=3))
    assert events == ["start", "start", "finish", "start", "finish", "finish"]


def test_caches_keep_their_buffers(engine):
    import torch_xla

    pointer = torch_xla._XLAC._unsafe_buffer_pointer
    caches = engine._runner.kv_caches
    before = [pointer(cache) for cache in caches]
    engine.generate_batch(PROMPTS, PARAMS)
    assert [pointer(cache) for cache in caches] == before


def test_random_traffic_gets_the_tokens_of_generation_one_by_one(eager, paged_on_xla):
    engine = Engine(paged_on_xla, OPTIONS)
    traffic = random_traffic(5, 40, too_long=(3,))
    outputs, audit = run(engine, traffic)
    check(eager, traffic, outputs)
    assert outputs[3].status == RequestStatus.FAILED
    assert engine.stats.num_preemptions > 0
    assert audit.num_foreign_reads > 0
    assert engine.stats.num_compilations <= engine.stats.max_compilations


def test_a_step_that_fails_half_recorded_leaves_nothing_behind(engine):
    expected = engine.generate_batch(PROMPTS, PARAMS)
    num_compilations = engine.stats.num_compilations
    forward, start = engine._runner.forward, engine._start

    def failing(inputs, last_generated=None, **keywords):
        forward(inputs, last_generated, **keywords)  # caches whose update is yet to run
        raise RuntimeError("broken")

    def start_failing_with_99(flight):
        is_bad = any(99 in row.request.prompt for row in flight.rows)
        engine._runner.forward = failing if is_bad else forward
        start(flight)

    engine._start = start_failing_with_99
    greedy = SamplingParams(max_new_tokens=4)
    results = engine.generate_batch([*PROMPTS, [99]], [*PARAMS, greedy])
    del engine._start
    engine._runner.forward = forward
    *others, bad = results.values()
    assert bad.error == "RuntimeError: broken"
    assert [o.generated_tokens for o in others] == [
        o.generated_tokens for o in expected.values()
    ]
    assert engine.stats.num_compilations == num_compilations


def test_what_requests_ask_of_logits_is_compiled_once_for_all_parameters(
    paged_on_xla, paged
):
    import torch_xla.debug.metrics as metrics

    options = dataclasses.replace(OPTIONS, token_buckets=(24,))
    engine = Engine(paged_on_xla, options)

    wishes: list[dict[str, Any]] = [
        {"repetition_penalty": 1.4, "logit_bias": {9: 2.0}, "logprobs": 2},
        {"min_tokens": 4, "eos_token_ids": (3, 4), "temperature": 0.9, "seed": 5},
        {"prompt_logprobs": 1, "bad_words_ids": [[7], [8, 1]]},
        {},
    ]
    params = [SamplingParams(max_new_tokens=6, **fields) for fields in wishes]
    metrics.clear_counters()
    outputs: list[Any] = list(engine.generate_batch(PROMPTS, params).values())
    assert [name for name in metrics.counter_names() if name.startswith("aten::")] == []
    num_programs = engine.stats.num_compilations
    # The model with logits of the last or of all tokens, choice, log probabilities.
    assert 0 < num_programs <= engine.stats.max_compilations == 3 + 2 + 1 + 2
    engine.generate_batch(PROMPTS, params[::-1])
    engine.generate_batch(PROMPTS, SamplingParams(presence_penalty=1.0, logprobs=9))
    engine.generate_batch(PROMPTS, PARAMS)
    assert engine.stats.num_compilations <= engine.stats.max_compilations
    assert engine.stats.num_failed_steps == 0

    options = dataclasses.replace(OPTIONS, device="cpu")
    results = Engine(paged, options).generate_batch(PROMPTS, params)
    on_cpu: list[Any] = list(results.values())
    for output, expected in zip(outputs, on_cpu, strict=True):
        assert output.generated_tokens == expected.generated_tokens
        assert output.cumulative_logprob == pytest.approx(
            expected.cumulative_logprob, abs=1e-4
        )
    (_, *found), (_, *there) = (
        outputs[2].prompt_logprobs,
        on_cpu[2].prompt_logprobs,
    )
    for table, expected in zip(found, there, strict=True):
        assert table.keys() == expected.keys()
        for token, logprob in table.items():
            assert logprob.logprob == pytest.approx(expected[token].logprob, abs=1e-4)

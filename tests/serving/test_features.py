"""What a request may ask beside its tokens, each compared with transformers."""

import asyncio
import copy
import json
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from tests.serving.page_audit import PageAudit
from torch_rpa.generate.tokenizer import ByteTokenizer
from torch_rpa.serving import (
    AsyncEngine,
    Engine,
    EngineOptions,
    RequestStatus,
    SamplingParams,
    StructuredOutputsParams,
)

TOKENIZER = ByteTokenizer()
PROMPTS = [[7, 7, 9], [65] * 9 + [66, 67], [3]]
NEW_TOKENS = 10


def engine_of(model, *, metrics=None, **keywords):
    defaults = {
        "max_num_sequences": 4,
        "max_tokens_per_step": 16,
        "max_sequence_length": 64,
        "page_size": 8,
        "device": "cpu",
    }
    options = EngineOptions(**{**defaults, **keywords})
    return Engine(model, options, tokenizer=TOKENIZER, metrics=metrics)


@pytest.fixture(scope="module")
def engine(paged):
    return engine_of(paged)


@pytest.fixture(scope="module")
def plain(engine):
    """What the model writes when nothing is asked for."""
    results = engine.generate_batch(PROMPTS, SamplingParams(max_tokens=NEW_TOKENS))
    return [output.generated_tokens for output in results.values()]


def of_transformers(eager, prompt, **fields):
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **fields
    )
    tokens = eager.generate(torch.tensor([prompt]), generation_config=config)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("lookahead", [True, False])
def test_changed_logits_give_the_tokens_of_transformers(eager, paged, plain, lookahead):
    ends = plain[0][2]
    fields = [
        {"repetition_penalty": 1.8},
        {"bad_words_ids": [[plain[1][0]], plain[1][1:3], [7, plain[1][4]]]},
        {"min_new_tokens": 6, "eos_token_id": ends, "repetition_penalty": 0.8},
    ]
    engine = engine_of(paged, lookahead=lookahead)
    configs = [GenerationConfig(max_new_tokens=NEW_TOKENS, **f) for f in fields]
    # A request that asks for nothing runs among them.
    prompts, configs = [*PROMPTS, PROMPTS[0]], [*configs, None]
    params = [
        SamplingParams.from_generation_config(config) if config else None
        for config in configs
    ]
    params[-1] = SamplingParams(max_new_tokens=NEW_TOKENS)
    results = list(engine.generate_batch(prompts, params).values())
    for output, prompt, wishes in zip(results, PROMPTS, fields, strict=False):
        expected = of_transformers(eager, prompt, **wishes)
        assert output.generated_tokens == expected, wishes
    assert results[0].generated_tokens != plain[0]
    assert results[1].generated_tokens != plain[1]
    assert results[-1].generated_tokens == plain[0]
    assert engine.stats.num_failed_steps == 0


def test_biases_and_counted_penalties_move_tokens(engine, plain):
    token = plain[0][0]
    wishes: tuple[dict[str, Any], ...] = (
        {"logit_bias": {token: -1000.0}},
        {"frequency_penalty": 2.0, "logit_bias": {token: 8.0}},
        {"bad_words": [chr(token)] if token < 128 else [], "bad_words_ids": [[token]]},
    )
    for fields in wishes:
        params = SamplingParams(max_tokens=NEW_TOKENS, **fields)
        (output,) = engine.generate_batch(PROMPTS[:1], params).values()
        assert output.status == RequestStatus.FINISHED
        assert output.generated_tokens != plain[0]
    repeated = SamplingParams(max_tokens=NEW_TOKENS, logit_bias={5: 1000.0})
    (output,) = engine.generate_batch(PROMPTS[:1], repeated).values()
    assert output.generated_tokens == [5] * NEW_TOKENS
    with pytest.raises(ValueError, match="logit_bias must be at least 0 and below 258"):
        engine.add_request([1], SamplingParams(logit_bias={258: 1.0}))
    with pytest.raises(ValueError, match="bad_words_ids must be at least 0"):
        engine.add_request([1], SamplingParams(bad_words_ids=[[1, -1]]))


@pytest.mark.parametrize("budget", [4, 16])
def test_log_probabilities_are_those_of_the_model(eager, paged, plain, budget):
    engine = engine_of(paged, max_tokens_per_step=budget)
    engine.generate_batch(PROMPTS[1:2], SamplingParams(max_tokens=2))  # cached prefix
    params = [
        SamplingParams(max_tokens=NEW_TOKENS, logprobs=3, repetition_penalty=1.5),
        SamplingParams(max_tokens=NEW_TOKENS, logprobs=0, prompt_logprobs=2),
        SamplingParams(max_tokens=NEW_TOKENS),
    ]
    outputs: list[Any] = list(engine.generate_batch(PROMPTS, params).values())
    for output, top in zip(outputs, (3, 0, None), strict=True):
        if top is None:
            assert output.logprobs is None and output.cumulative_logprob is None
            continue
        tokens = output.prompt_ids + output.generated_tokens
        with torch.no_grad():
            expected = eager(torch.tensor([tokens])).logits[0].log_softmax(-1)
        first = len(output.prompt_ids) - 1
        total = 0.0
        for step, (token, found) in enumerate(
            zip(output.generated_tokens, output.logprobs, strict=True)
        ):
            row = expected[first + step]
            likely = row.argsort(descending=True)[:top].tolist()
            assert set(found) == {token, *likely}
            for other, logprob in found.items():
                assert logprob.logprob == pytest.approx(float(row[other]), abs=1e-4)
            assert found[token].decoded_token == TOKENIZER.decode([token], False)
            total += float(row[token])
        assert output.cumulative_logprob == pytest.approx(total, abs=1e-3)
    # The prompt's: all are computed, though some were cached.
    output = outputs[1]
    assert output.num_shared_tokens == 0
    assert outputs[0].prompt_logprobs is None
    none, *found = output.prompt_logprobs
    assert none is None and len(found) == len(PROMPTS[1]) - 1
    with torch.no_grad():
        expected = eager(torch.tensor([PROMPTS[1]])).logits[0].log_softmax(-1)
    for position, table in enumerate(found):
        row, token = expected[position], PROMPTS[1][position + 1]
        assert set(table) == {token, *row.argsort(descending=True)[:2].tolist()}
        assert table[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert table[token].rank == int((row > row[token]).sum()) + 1


def test_several_texts_share_the_pages_of_their_prompt(engine):
    prompt = [11] * 17
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=3, n=3)
    results = engine.generate_batch([prompt], params)
    names = ["req", "req__child#0", "req__child#1"]
    assert [name.replace(name.split("__")[0], "req") for name in results] == names
    outputs = list(results.values())
    assert [output.index for output in outputs] == [0, 1, 2]
    assert [output.num_shared_tokens for output in outputs] == [0, 16, 16]
    texts = [output.generated_tokens for output in outputs]
    assert len({tuple(tokens) for tokens in texts}) == 3
    alone = [
        SamplingParams(max_tokens=6, temperature=1.0, seed=3 + i) for i in range(3)
    ]
    separate = engine.generate_batch([prompt] * 3, alone)
    assert [output.generated_tokens for output in separate.values()] == texts
    engine.add_request(prompt, params, request_id="all")
    engine.add_request(prompt, request_id="all__child#7")  # somebody's own name
    engine.step()
    assert engine.cancel("all")
    ended = {u.request_id: u.output.status.name for u in engine.stream()}
    cancelled = ["all", "all__child#0", "all__child#1"]
    assert ended == dict.fromkeys(cancelled, "CANCELLED") | {"all__child#7": "FINISHED"}
    assert engine.scheduler.allocator.num_held == 0


def test_several_texts_come_through_one_asynchronous_generator(engine):
    params = SamplingParams(max_tokens=3, temperature=1.0, n=2)

    async def serve():
        async with AsyncEngine(engine) as server:
            return [update async for update in server.generate([1, 2], params)]

    updates = asyncio.run(serve())
    assert sorted(update.output.index for update in updates) == [0] * 3 + [1] * 3
    assert sum(update.is_last for update in updates) == 2


def test_text_comes_in_and_goes_out(engine):
    tokens = [ord(character) for character in "ab"]
    params = SamplingParams(max_tokens=4, logit_bias={ord("z"): 1000.0})
    (output,) = engine.generate_batch(["ab"], params).values()
    assert output.prompt_ids == [TOKENIZER.bos_token_id, *tokens]
    assert output.text == "zzzz"
    no_tokenizer = Engine(engine._runner.model, engine.options)
    with pytest.raises(ValueError, match="for a text as prompt_ids"):
        no_tokenizer.add_request("ab")
    with pytest.raises(ValueError, match="for bad_words, got None"):
        no_tokenizer.add_request([1], SamplingParams(bad_words=["a"]))
    with pytest.raises(
        ValueError, match=r"bad_words must be texts with tokens, .* ' '"
    ):
        engine.add_request([1], SamplingParams(bad_words=[" "]))
    (output,) = no_tokenizer.generate_batch(
        [[1]], SamplingParams(max_tokens=1)
    ).values()
    with pytest.raises(ValueError, match="for text, got None"):
        _ = output.text


@pytest.mark.parametrize("keeps", [False, True])
def test_a_stop_string_is_cut_off_unless_it_is_wanted(engine, keeps):
    # "zzzz..." would end at "zz", which comes in two steps.
    params = SamplingParams(
        max_tokens=9,
        stop="zz",
        logit_bias={ord("z"): 1000.0},
        include_stop_str_in_output=keeps,
        min_tokens=3,
    )
    engine.add_request([65], params)
    updates = list(engine.stream())
    output = updates[-1].output
    assert len(output.generated_tokens) == 3  # as many as there must be
    assert output.finish_reason == "stop" and output.stop_reason == "zz"
    assert output.text == ("zzz" if keeps else "z")
    assert "".join(update.new_text for update in updates) == output.text


def test_what_may_become_a_stop_string_is_held_back_until_it_does_not(engine):
    params = SamplingParams(max_tokens=3, stop="zzzzz", logit_bias={ord("z"): 1000.0})
    engine.add_request([65], params)
    assert [update.new_text for update in engine.stream()] == ["", "", "zzz"]


@pytest.mark.parametrize("lookahead", [True, False])
def test_structured_outputs_are_what_was_asked_for(paged, lookahead):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yy"]}, "n": {"enum": [1, 22]}},
        "required": ["a", "n"],
        "additionalProperties": False,
    }
    engine = engine_of(paged, lookahead=lookahead)
    wishes = [{"json": schema}, {"regex": "[ab]{5}c"}, {"choice": ["no", "maybe"]}]
    params = [
        SamplingParams(
            max_tokens=40,
            temperature=temperature,
            seed=1,
            structured_outputs=StructuredOutputsParams(**wish),
            bad_words_ids=[[ord(space)] for space in " \t\r\n"],  # or it is endless
        )
        for wish in wishes
        for temperature in (0.0, 1.0)
    ]
    params.append(SamplingParams(max_tokens=5))
    results = list(engine.generate_batch([[3]] * 7, params).values())
    texts = [output.text for output in results[:6]]
    for text in texts[:2]:
        value = json.loads(text)
        assert value["a"] in ("x", "yy") and value["n"] in (1, 22)
    for text in texts[2:4]:
        assert len(text) == 6 and text[-1] == "c" and set(text[:-1]) <= {"a", "b"}
    assert set(texts[4:]) <= {"no", "maybe"}
    assert {output.finish_reason for output in results[:6]} == {"stop"}
    (alone,) = engine.generate_batch([[3]], params[-1]).values()
    assert results[6].generated_tokens == alone.generated_tokens
    assert engine.stats.num_failed_steps == 0


def test_metrics_count_what_happened(paged, plain):
    client = pytest.importorskip("prometheus_client")
    from torch_rpa.serving import PrometheusMetrics

    registry = client.CollectorRegistry()
    metrics = PrometheusMetrics(prefix="vllm:", model_name="m", registry=registry)
    engine = engine_of(paged, metrics=metrics)
    engine.generate_batch(PROMPTS, SamplingParams(max_tokens=NEW_TOKENS))
    engine.generate_batch([[1] * 99], SamplingParams())  # does not fit
    engine.add_request(PROMPTS[0], request_id="gone")
    engine.cancel("gone")
    list(engine.stream())

    def value(name, **labels):
        return registry.get_sample_value(f"vllm:{name}", {"model_name": "m", **labels})

    num_prompt = sum(map(len, PROMPTS))
    assert value("prompt_tokens_total") == num_prompt
    assert value("generation_tokens_total") == 3 * NEW_TOKENS
    assert value("request_success_total", finished_reason="length") == 3
    assert value("request_success_total", finished_reason="error") == 1
    assert value("request_success_total", finished_reason="abort") == 1
    assert value("num_requests_running") == value("num_requests_waiting") == 0
    assert value("kv_cache_usage_perc") == 0
    assert value("time_to_first_token_seconds_count") == 3
    assert value("inter_token_latency_seconds_count") == 3 * (NEW_TOKENS - 1)
    assert value("e2e_request_latency_seconds_count") == 5
    assert value("iteration_tokens_total_count") == engine.stats.num_steps
    assert value("iteration_tokens_total_sum") == engine.stats.num_tokens


@pytest.mark.parametrize(
    "keywords", [{}, {"num_pages": 9}, {"prefix_caching": False}, {"lookahead": False}]
)
def test_pages_that_every_window_has_left_are_free(keywords):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        sliding_window=10,
    )
    model = MistralForCausalLM(config).eval()
    eager = MistralForCausalLM(copy.deepcopy(config)).eval()
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    engine = engine_of(model, max_tokens_per_step=12, **keywords)
    audit = PageAudit(engine.scheduler)
    held = []
    prompts = [[5] * 30, [6] * 30 + [4], [5] * 30 + [8] * 3, [9] * 30, [2]]
    params = SamplingParams(max_tokens=NEW_TOKENS * 2)
    names = [engine.add_request(prompt, params) for prompt in prompts]
    outputs = {}
    for update in engine.stream():
        outputs[update.request_id] = update.output
        held += [
            len(request.held_pages)
            for request in engine.scheduler.running
            if request.num_cached > 40
        ]
    for name in names:
        output = outputs[name]
        tokens = output.prompt_ids + output.generated_tokens
        with torch.no_grad():
            logits = eager(torch.tensor([tokens])).logits[0]
        expected = logits[len(output.prompt_ids) - 1 : -1].argmax(-1).tolist()
        assert output.generated_tokens == expected
    # A window of 10 lies in at most 3 pages of 8, and one step may be on the way.
    assert held and max(held) <= 4
    assert audit.num_rows > 50
    assert engine.scheduler.allocator.num_held == 0


def test_the_example_of_metrics_runs(paged):
    pytest.importorskip("prometheus_client")
    from tests.support import snippets

    (snippet,) = [
        s for s in snippets.all_snippets("python", "") if s.marker == "metrics example"
    ]
    names = {"Engine": Engine, "EngineOptions": EngineOptions, "model": paged}
    exec(snippet.code, names)
    assert 'vllm:num_requests_running{model_name="my-model"} 0.0' in names["text"]

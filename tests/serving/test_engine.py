"""Generation for all prompts at once equals the model's own, one by one."""

import contextlib
import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests.support.recorded_caches import SCALES, RecordedCaches, assert_only_scaled
from tests.support.tiny_llama import build_llama
from torch_rpa.generate.check import reference_generate
from torch_rpa.serving import Engine, EngineOptions, RequestStatus, SamplingParams

NEW_TOKENS = 12
GREEDY = SamplingParams(max_new_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Four prompts whose lengths straddle pages of 8: 1, 8, 9 and 21 tokens."""
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randint(0, 256, (length,), generator=generator).tolist()
        for length in (1, 8, 9, 21)
    ]


@pytest.fixture(scope="module")
def expected(eager, prompts):
    return expected_tokens(eager, prompts)


def expected_tokens(model, prompts, **keywords):
    return [
        reference_generate(model, prompt, max_new_tokens=NEW_TOKENS, **keywords)
        for prompt in prompts
    ]


def engine_of(model, *, on_step=lambda record: None, tokenizer=None, **keywords):
    defaults = {
        "max_num_sequences": 4,
        "max_tokens_per_step": 40,
        "max_sequence_length": 64,
        "page_size": 8,
        "device": "cpu",
    }
    options = EngineOptions(**{**defaults, **keywords})
    return Engine(model, options, on_step=on_step, tokenizer=tokenizer)


def tokens_of(results):
    return [output.generated_tokens for output in results.values()]


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("xla", marks=pytest.mark.torch_xla)]
)
def test_tokens_equal_the_models_own(prompts, expected, device):
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)
    steps = []
    engine = engine_of(build_llama("rpa"), device=device, on_step=steps.append)
    results = engine.generate_batch(prompts, GREEDY)
    assert tokens_of(results) == expected
    assert list(results) == ["req_0", "req_1", "req_2", "req_3"]
    assert {output.status for output in results.values()} == {RequestStatus.FINISHED}
    assert {output.finish_reason for output in results.values()} == {"length"}
    assert [step.num_tokens for step in steps] == [39] + [4] * 11
    assert engine.stats.num_generated == len(prompts) * NEW_TOKENS
    assert engine.stats.num_surplus == 0


@pytest.mark.parametrize("budget", [4, 10])
def test_prefill_in_chunks_gives_the_same_tokens(paged, prompts, expected, budget):
    steps = []
    engine = engine_of(paged, max_tokens_per_step=budget, on_step=steps.append)
    assert tokens_of(engine.generate_batch(prompts, GREEDY)) == expected
    assert max(step.num_tokens for step in steps) == budget


@pytest.mark.parametrize(
    "shape", [{"head_dim": 128}, {"num_kv_heads": 1}, {"num_kv_heads": 4}]
)
def test_other_heads_agree(prompts, shape):
    expected = expected_tokens(build_llama("eager", **shape), prompts)
    engine = engine_of(build_llama("rpa", **shape))
    assert tokens_of(engine.generate_batch(prompts, GREEDY)) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "cache_dtype"),
    [
        ("cpu", None),
        ("cpu", torch.int8),
        ("cpu", torch.float8_e4m3fn),
        pytest.param("xla", None, marks=pytest.mark.torch_xla),
    ],
)
def test_bfloat16_models_run_with_every_kind_of_cache(prompts, device, cache_dtype):
    model = build_llama("rpa").to(torch.bfloat16)
    scales = {"k_scale": 1 / 16, "v_scale": 1 / 16} if cache_dtype else {}
    engine = engine_of(model, device=device, cache_dtype=cache_dtype, **scales)
    results = engine.generate_batch(prompts, GREEDY)
    assert list(map(len, tokens_of(results))) == [NEW_TOKENS] * len(prompts)


@pytest.mark.parametrize("kind", SCALES)
def test_scales_divide_what_is_stored_and_change_no_token(
    paged, prompts, expected, monkeypatch, kind
):
    caches = RecordedCaches(monkeypatch)
    engine_of(paged).generate_batch(prompts, GREEDY)
    unscaled = caches.last()
    k_scale, v_scale = SCALES[kind]
    engine = engine_of(paged, k_scale=k_scale, v_scale=v_scale)
    assert tokens_of(engine.generate_batch(prompts, GREEDY)) == expected
    assert_only_scaled(caches.last(), unscaled, kind)


def test_the_first_bfloat16_token_is_nearly_the_best(eager, prompts):
    # The budget: twice what rounding the model itself to bfloat16 costs.
    rounded = build_llama("eager").to(torch.bfloat16)
    engine = engine_of(build_llama("rpa").to(torch.bfloat16))
    for output in engine.generate_batch(prompts, GREEDY).values():
        prompt = torch.tensor([output.prompt_ids])
        with torch.no_grad():
            logits = eager(prompt).logits[0, -1]
            error = (rounded(prompt).logits[0, -1] - logits).abs().max()
        assert logits[output.generated_tokens[0]] >= logits.max() - 2 * error


def test_end_of_text_frees_pages_and_leaves_the_others_alone(
    eager, paged, prompts, expected
):
    # A token that some prompts generate early and others late or never.
    eos = expected[0][3]
    stopped = expected_tokens(eager, prompts, eos_token_ids=[eos])
    assert len(stopped[0]) == expected[0].index(eos) + 1 < NEW_TOKENS
    assert max(map(len, stopped)) == NEW_TOKENS
    engine = engine_of(paged)
    params = SamplingParams(max_new_tokens=NEW_TOKENS, eos_token_ids=(eos,))
    results = engine.generate_batch(prompts, params)
    assert tokens_of(results) == stopped
    assert results["req_0"].finish_reason == "stop"
    assert engine.scheduler.allocator.num_held == 0
    assert engine.stats.num_surplus == sum(len(t) < NEW_TOKENS for t in stopped)


def test_stop_sequences_end_a_text(paged, prompts, expected):
    tokens = expected[3]
    stop = (tuple(tokens[4:6]), (1, 2, 3))
    params = SamplingParams(max_new_tokens=NEW_TOKENS, stop_sequences=stop)
    (output,) = engine_of(paged).generate_batch(prompts[3:], params).values()
    assert output.generated_tokens == tokens[:6]
    assert output.finish_reason == "stop"


class Letters:
    """A tokenizer whose token 3 is "<3>"."""

    def decode(self, token_ids, skip_special_tokens):
        return "".join(f"<{token}>" for token in token_ids)


def test_stop_strings_may_lie_across_tokens(paged, prompts, expected):
    tokens = expected[3]
    string = f"{tokens[4]}><{tokens[5]}"
    params = SamplingParams(max_new_tokens=NEW_TOKENS, stop_strings=string)
    engine = engine_of(paged, tokenizer=Letters())
    (output,) = engine.generate_batch(prompts[3:], params).values()
    assert output.generated_tokens == tokens[:6]
    with pytest.raises(ValueError, match="tokenizer must be given"):
        engine_of(paged).add_request([1], params)


def test_the_models_generation_config_is_the_default(paged, prompts, expected):
    engine = engine_of(paged)
    results = engine.generate_batch(prompts, max_new_tokens=NEW_TOKENS)
    assert tokens_of(results) == expected
    config = GenerationConfig(max_new_tokens=3, do_sample=False)
    results = engine.generate_batch(prompts, config)
    assert tokens_of(results) == [tokens[:3] for tokens in expected]


def test_a_largest_length_of_the_model_ends_texts(paged, prompts, expected):
    """As in the generation config of Llama 2, whose texts may fill all positions."""
    model = copy.copy(paged)
    model.generation_config = GenerationConfig(max_length=30, eos_token_id=257)
    for longest, num_new in (64, 22), (25, 17):
        engine = engine_of(model, max_sequence_length=longest)
        (output,) = engine.generate_batch(prompts[1:2]).values()
        assert len(output.generated_tokens) == num_new
        assert output.generated_tokens[:NEW_TOKENS] == expected[1]
        (output,) = engine.generate_batch(prompts[1:2], max_tokens=2).values()
        assert output.generated_tokens == expected[1][:2]


def test_each_request_has_parameters_of_its_own(paged, prompts, expected):
    with pytest.raises(ValueError, match=r"params must be SamplingParams, .*'greedy'"):
        wishes: Any = "greedy"
        engine_of(paged).generate_batch(prompts, wishes)
    params = [SamplingParams(max_new_tokens=n) for n in (1, 2, 3, 4)]
    results = engine_of(paged).generate_batch(prompts, params)
    assert tokens_of(results) == [
        tokens[:n] for tokens, n in zip(expected, (1, 2, 3, 4), strict=True)
    ]


def test_a_conversation_goes_on_from_its_cached_pages(paged, prompts, expected):
    engine = engine_of(paged)
    engine.generate_batch(prompts[3:], GREEDY)
    longer = prompts[3] + expected[3] + [5]  # 32 tokens of it are in the cache
    (output,) = engine.generate_batch([longer], GREEDY).values()
    assert output.num_shared_tokens == 32
    (alone,) = engine_of(paged).generate_batch([longer], GREEDY).values()
    assert output.generated_tokens == alone.generated_tokens


def test_requests_come_and_go_while_others_run(paged, prompts, expected):
    engine = engine_of(paged)
    engine.add_request(prompts[3], GREEDY, request_id="long")
    seen = []
    for number, update in enumerate(engine.stream()):
        seen.append((update.request_id, update.new_tokens, update.is_last))
        if number == 3:
            engine.add_request(prompts[0], GREEDY, request_id="late")
    for name, tokens in (("long", expected[3]), ("late", expected[0])):
        own = [(new, last) for who, new, last in seen if who == name]
        assert own == [([t], i == NEW_TOKENS - 1) for i, t in enumerate(tokens)]
    assert [who for who, _, _ in seen].index("late") < NEW_TOKENS - 1


def test_a_cancelled_request_frees_its_pages_and_hurts_nobody(paged, prompts, expected):
    engine = engine_of(paged, max_num_sequences=3)
    for index, prompt in enumerate(prompts):
        engine.add_request(prompt, GREEDY, request_id=str(index))
    outputs = {}
    for number, update in enumerate(engine.stream()):
        outputs[update.request_id] = update.output
        if number == 4:
            assert engine.cancel("0") and engine.cancel("3")  # running and waiting
            assert not engine.cancel("0") and not engine.cancel("nobody")
    assert outputs["0"].status == outputs["3"].status == RequestStatus.CANCELLED
    assert outputs["0"].generated_tokens == expected[0][:2]
    assert outputs["3"].generated_tokens == []
    assert [outputs[name].generated_tokens for name in "12"] == expected[1:3]
    assert engine.scheduler.allocator.num_held == 0


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_sequence_length": 32}, "21 prompt tokens and 12 new ones must be at"),
        ({"num_pages": 3}, "need 4 pages, got 3 in all: raise num_pages"),
    ],
)
def test_a_request_that_can_never_fit_fails_alone(
    paged, prompts, expected, keywords, message
):
    engine = engine_of(paged, **keywords)
    results = list(engine.generate_batch(prompts, GREEDY).values())
    assert results[3].status == RequestStatus.FAILED and results[3].is_finished()
    assert message in results[3].error and results[3].generated_tokens == []
    assert [output.generated_tokens for output in results[:3]] == expected[:3]


def test_outputs_tell_when_things_happened(paged, prompts):
    (output,) = engine_of(paged).generate_batch(prompts[3:], GREEDY).values()
    times = [output.created_time, output.lifespan[0], *output.timestamps]
    assert times == sorted(times)
    assert len(output.timestamps) == NEW_TOKENS
    assert output.lifespan[1] >= output.timestamps[-1]


@pytest.mark.parametrize(
    ("prompt", "keywords", "message"),
    [
        ([], {}, "must have at least one token, got none"),
        (
            torch.empty(1, 0, dtype=torch.int64),
            {},
            "must have at least one token, got none",
        ),
        ([1, 258], {}, "at least 0 and below 258, got 1 to 258"),
        ([-1], {}, "at least 0 and below 258, got -1 to -1"),
        ([1], {"request_id": "taken"}, "request_id must be new, got 'taken' again"),
    ],
)
def test_malformed_requests_are_refused_at_once(paged, prompt, keywords, message):
    engine = engine_of(paged)
    engine.add_request([1], GREEDY, request_id="taken")
    with pytest.raises(ValueError, match=message):
        engine.add_request(prompt, GREEDY, **keywords)
    with pytest.raises(ValueError, match=message):
        if keywords:
            engine.add_request(prompt, GREEDY, **keywords)
        engine.generate_batch([[2], prompt], GREEDY)  # adds neither
    with pytest.raises(RuntimeError, match="before requests are added"):
        engine.warm_up()
    assert len([u for u in engine.stream() if u.is_last]) == 1


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_sequence_length": 513}, "at most the model's 512 positions, got 513"),
        ({"device": "cuda"}, "'tpu' or 'cpu', got 'cuda'"),
        ({"page_size": 12}, "page_size must be a power of two"),
        ({"page_size": 0}, "page_size must be at least 1, .*got 0"),
        ({"max_sequence_length": 1}, "max_sequence_length must be at least 2, .*got 1"),
        ({"token_buckets": (40, 8)}, r"positive and ascending ints, got \(40, 8\)"),
        ({"num_pages": 0}, "num_pages must be at least 1, .*got 0"),
        (
            {"token_buckets": (8, 16)},
            r"end with max_tokens_per_step = 40 or more, got \(8, 16\)",
        ),
        ({"max_tokens_per_step": 3}, "each of the 4 sequences, got 3"),
        ({"max_num_sequences": 0}, "max_num_sequences must be at least 1, .*got 0"),
        ({"max_num_sequences": True}, "max_num_sequences must be an int, got True"),
        ({"max_tokens_per_step": -1}, "max_tokens_per_step must be at least 1"),
        ({"max_tokens_per_step": 40.5}, "max_tokens_per_step must be an int, got 40.5"),
        ({"num_pages": 2**40}, "num_pages must be at least 1, and below"),
        ({"num_pages": "9"}, "num_pages must be an int or None, got '9'"),
        ({"token_buckets": ()}, "token_buckets must be positive"),
        ({"token_buckets": 40}, "token_buckets must be positive and ascending ints"),
        ({"token_buckets": ("40",)}, "token_buckets must be positive"),
        ({"cache_dtype": "int8"}, "cache_dtype must be a torch.dtype, got 'int8'"),
        ({"k_scale": 0.0}, "k_scale must be a positive Python number .* got 0.0"),
        ({"v_scale": 1e39}, "v_scale must be a positive Python number .* got 1e"),
        ({"v_scale": True}, "v_scale must be a positive Python number .* got True"),
        ({"prefix_caching": 1}, "prefix_caching must be True or False, got 1"),
        ({"seed": "a"}, "seed must be an int, got 'a'"),
        ({"device": 0}, "device must be a str or None, got 0"),
    ],
)
def test_impossible_options_are_refused(paged, keywords, message):
    with pytest.raises(ValueError, match=message):
        engine_of(paged, **keywords)


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_positions_scaled_by_the_batch_are_refused_where_they_would_be(name):
    length = {"original_max_position_embeddings": 100}
    # Older releases of transformers have the length beside the parameters.
    inside, beside = (length, {}) if name == "rope_parameters" else ({}, length)
    scaling = {"rope_type": "dynamic", **inside}
    for parameters in (scaling, {"full_attention": scaling}):
        config = SimpleNamespace(
            **{name: parameters}, **beside, max_position_embeddings=400
        )
        assert EngineOptions().sequence_length(config) == 100
        with pytest.raises(NotImplementedError, match="at most 100 for this model"):
            EngineOptions(max_sequence_length=101).sequence_length(config)


def broken_by(engine, token, error):
    """Has every step with a token raise, when it is started."""
    forward = engine._runner.forward

    def broken(inputs, last_generated=None, **keywords):
        if token in inputs.input_ids:
            raise error
        return forward(inputs, last_generated, **keywords)

    engine._runner.forward = broken


@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("position", [0, 2, 4])
def test_the_request_that_makes_a_step_raise_fails_alone(
    paged, prompts, expected, position, lookahead, caplog
):
    engine = engine_of(paged, max_num_sequences=5, lookahead=lookahead)
    broken_by(engine, 256, MemoryError("no room"))
    inputs = [*prompts[:position], [1, 2, 256], *prompts[position:]]
    outputs = list(engine.generate_batch(inputs, GREEDY).values())
    culprit = outputs.pop(position)
    assert culprit.status == RequestStatus.FAILED
    assert (culprit.error, culprit.finish_reason) == ("MemoryError: no room", None)
    assert [output.generated_tokens for output in outputs] == expected
    assert {output.status for output in outputs} == {RequestStatus.FINISHED}
    assert engine.scheduler.allocator.num_held == 0
    assert 2 <= engine.stats.num_failed_steps <= 4  # halves of five
    assert "a step failed" in caplog.text and "MemoryError: no room" in caplog.text
    again = engine.generate_batch(prompts, GREEDY)
    assert tokens_of(again) == expected


def test_an_error_that_comes_with_the_tokens_is_found_as_well(
    paged, prompts, expected, monkeypatch
):
    class Lost:
        """A tensor whose program has failed on the device."""

        def cpu(self):
            raise RuntimeError("device error")

    engine = engine_of(paged)
    run = engine._steps.run

    def failing_later(rows, *arguments):
        tokens = run(rows, *arguments)
        return Lost() if any(256 in row.request.prompt for row in rows) else tokens

    monkeypatch.setattr(engine._steps, "run", failing_later)
    outputs = list(engine.generate_batch([*prompts, [256]], GREEDY).values())
    assert outputs.pop().error == "RuntimeError: device error"
    assert [output.generated_tokens for output in outputs] == expected


def test_a_batch_that_fails_only_together_gets_to_its_end(
    paged, prompts, expected, monkeypatch
):
    engine = engine_of(paged)
    run = engine._steps.run

    def too_large(rows, *arguments):
        if len(rows) > 2:
            raise MemoryError
        return run(rows, *arguments)

    monkeypatch.setattr(engine._steps, "run", too_large)
    assert tokens_of(engine.generate_batch(prompts, GREEDY)) == expected


def test_a_device_that_is_lost_fails_every_request_and_comes_back(
    paged, prompts, expected, monkeypatch
):
    def lost(*arguments):
        raise RuntimeError("device lost")

    engine = engine_of(paged)
    with monkeypatch.context() as patch:
        patch.setattr(engine._steps, "run", lost)
        patch.setattr(engine._runner, "renew_caches", lost)
        outputs = engine.generate_batch(prompts, GREEDY).values()
    assert {output.error for output in outputs} == {"RuntimeError: device lost"}
    assert not engine.has_unfinished
    assert tokens_of(engine.generate_batch(prompts, GREEDY)) == expected


def test_a_tokenizer_that_raises_fails_its_own_request(paged, prompts, expected):
    class Broken(Letters):
        def decode(self, token_ids, skip_special_tokens):
            if expected[3][5] in token_ids:
                raise OverflowError("no such token")
            return super().decode(token_ids, skip_special_tokens)

    engine = engine_of(paged, tokenizer=Broken())
    stopping = SamplingParams(max_new_tokens=NEW_TOKENS, stop_strings="never")
    params = [GREEDY, GREEDY, GREEDY, stopping]
    outputs = list(engine.generate_batch(prompts, params).values())
    failed = outputs.pop()
    assert failed.error == "OverflowError: no such token"
    assert failed.generated_tokens == expected[3][:6]
    assert [output.generated_tokens for output in outputs] == expected[:3]


def test_an_engine_that_cannot_go_on_says_so_instead_of_waiting(paged, prompts):
    engine = engine_of(paged)
    engine.scheduler.schedule = lambda among=None: []
    for output in engine.generate_batch(prompts, GREEDY).values():
        assert output.error is not None and "requests can go on" in output.error


def test_an_interrupt_leaves_every_request_whole(paged, prompts, expected):
    engine = engine_of(paged)
    for prompt in prompts:
        engine.add_request(prompt, GREEDY)
    forward, tokens, num_calls = engine._runner.forward, {}, 0

    def interrupted(inputs, last_generated=None, **keywords):
        nonlocal num_calls
        num_calls += 1
        if num_calls % 5 == 0:
            raise KeyboardInterrupt
        return forward(inputs, last_generated, **keywords)

    engine._runner.forward = interrupted
    while engine.has_unfinished:
        try:
            for update in engine.step():
                tokens.setdefault(update.request_id, []).extend(update.new_tokens)
        except KeyboardInterrupt:
            assert num_calls % 5 == 0
    assert list(tokens.values()) == expected and num_calls > 10


def test_an_error_of_on_step_loses_no_token(paged, prompts, expected):
    def on_step(record):
        raise ZeroDivisionError

    engine = engine_of(paged, on_step=on_step)
    tokens = {engine.add_request(prompt, GREEDY): [] for prompt in prompts}
    while engine.has_unfinished:
        with contextlib.suppress(ZeroDivisionError):
            for update in engine.step():
                tokens[update.request_id] += update.new_tokens
    assert list(tokens.values()) == expected


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"options": {"page_size": 8}}, "options must be EngineOptions or None, got"),
        ({"on_step": None}, "on_step must be a function, got NoneType"),
        ({"model": None}, "model must be a causal language model, got NoneType"),
        ({"model": torch.nn.Linear(1, 1)}, "model must be a causal .*, got Linear"),
        ({"tokenizer": "a name"}, "tokenizer must be a tokenizer or None, got str"),
        ({"metrics": True}, "metrics must be PrometheusMetrics or None, got bool"),
    ],
)
def test_engines_take_nothing_else(paged, keywords, message):
    with pytest.raises(ValueError, match=message):
        Engine(**{"model": paged, **keywords})


def test_wishes_may_be_a_dict(paged, prompts, expected):
    engine = engine_of(paged)
    wishes = {"max_new_tokens": 3, "eos_token_ids": 257}
    assert tokens_of(engine.generate_batch(prompts, wishes)) == [
        tokens[:3] for tokens in expected
    ]
    with pytest.raises(ValueError, match=r"params must have fields .*, got \['max'\]"):
        engine.add_request(prompts[0], {"max": 3})
    with pytest.raises(ValueError, match=r"params must be SamplingParams, .* got 3"):
        engine.add_request(prompts[0], 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="one for all or for each of 4 prompts, got 2"):
        engine.generate_batch(prompts, [wishes, wishes])
    assert not engine.has_unfinished


def test_texts_end_at_the_models_own_end_unless_told_otherwise(prompts, expected):
    model = build_llama("rpa")
    model.generation_config = GenerationConfig(eos_token_id=[expected[3][2], 257])
    engine = engine_of(model)
    for params, length in (
        (GREEDY, 3),
        ({"max_new_tokens": NEW_TOKENS}, 3),
        (GenerationConfig(max_new_tokens=NEW_TOKENS), 3),
        (SamplingParams(max_new_tokens=NEW_TOKENS, eos_token_ids=()), NEW_TOKENS),
        (SamplingParams(max_new_tokens=NEW_TOKENS, eos_token_ids=expected[3][1]), 2),
    ):
        (output,) = engine.generate_batch(prompts[3:], params).values()
        assert output.generated_tokens == expected[3][:length]


def test_names_of_others_are_left_to_them(paged):
    engine = engine_of(paged)
    assert engine.add_request([1], GREEDY, request_id="req_0") == "req_0"
    assert engine.add_request([1], GREEDY) == "req_1"
    with pytest.raises(ValueError, match="request_id must be a str or None, got 2"):
        engine.add_request([1], GREEDY, request_id=2)  # pyright: ignore


@pytest.fixture
def models():
    """The same model twice, to be changed: eager and paged."""
    return build_llama("eager"), build_llama("rpa")


@torch.no_grad()
def train(model):
    model.model.layers[0].self_attn.v_proj.weight.mul_(-1)


def test_changed_weights_make_prefixes_anew(models, prompts, expected):
    eager, paged = models
    engine = engine_of(paged)
    assert tokens_of(engine.generate_batch(prompts[3:], GREEDY)) == expected[3:]
    for model in models:
        train(model)
    changed = expected_tokens(eager, prompts[3:])
    assert changed != expected[3:]
    (output,) = engine.generate_batch(prompts[3:], GREEDY).values()
    assert output.generated_tokens == changed[0] and output.num_shared_tokens == 0
    (output,) = engine.generate_batch(prompts[3:], GREEDY).values()
    assert output.generated_tokens == changed[0] and output.num_shared_tokens == 16


@pytest.mark.parametrize("lookahead", [True, False])
def test_weights_changed_in_the_middle_hold_from_there_on(models, prompts, lookahead):
    eager, paged = models
    engine = engine_of(paged, lookahead=lookahead)
    name = engine.add_request(prompts[3], GREEDY)
    tokens = []
    for update in engine.stream():
        tokens += update.new_tokens
        if len(tokens) == 5:
            for model in models:
                train(model)
            num_before = 5 + lookahead  # one more had been started
    assert update.request_id == name and update.output.num_preemptions == 1
    rest = reference_generate(
        eager, prompts[3] + tokens[:num_before], max_new_tokens=NEW_TOKENS - num_before
    )
    assert tokens[num_before:] == rest


def test_a_reset_forgets_prefixes_and_loses_nobody(paged, prompts, expected):
    engine = engine_of(paged)
    engine.generate_batch(prompts[3:], GREEDY)
    engine.reset_prefix_cache()
    (output,) = engine.generate_batch(prompts[3:], GREEDY).values()
    assert output.generated_tokens == expected[3] and output.num_shared_tokens == 0
    names = [engine.add_request(prompt, GREEDY) for prompt in prompts]
    outputs = {}
    for number, update in enumerate(engine.stream()):
        outputs[update.request_id] = update.output
        if number in (3, 17):
            engine.reset_prefix_cache()
    assert [outputs[name].generated_tokens for name in names] == expected
    assert {outputs[name].num_preemptions for name in names} == {2}


class Switched(torch.nn.Module):
    """A layer with an adapter that can be switched off, as those of PEFT."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.is_off = layer, False

    @property
    def disable_adapters(self):
        return self.is_off

    def forward(self, hidden):
        return self.layer(hidden) * (1 if self.is_off else -1)


def test_prefixes_are_those_of_the_adapters_that_are_on(prompts, expected):
    model = build_llama("rpa")
    layers: Any = model.model.layers
    switch = layers[0].self_attn.v_proj = Switched(layers[0].self_attn.v_proj)
    engine, texts, shared = engine_of(model), [], []
    for is_off in (False, True, False, True):
        switch.is_off = is_off
        (output,) = engine.generate_batch(prompts[3:], GREEDY).values()
        texts.append(output.generated_tokens)
        shared.append(output.num_shared_tokens)
    assert texts[1] == texts[3] == expected[3]
    assert texts[0] == texts[2] != expected[3]
    assert shared == [0, 0, 16, 16]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("lookahead", [True, False])
def test_logits_that_are_no_numbers_fail_their_own_request(
    prompts, expected, temperature, lookahead
):
    model = build_llama("rpa")
    with torch.no_grad():
        model.model.embed_tokens.weight[256] = torch.nan
    engine = engine_of(model, max_num_sequences=5, lookahead=lookahead, num_pages=20)
    bad = SamplingParams(max_new_tokens=9, temperature=temperature, seed=1)
    bad_prompt = [1] * 12 + [256] + [2] * 7
    for _ in range(2):  # then in the pages that the first one left
        params = [GREEDY, GREEDY, bad, GREEDY, GREEDY]
        inputs = [*prompts[:2], bad_prompt, *prompts[2:]]
        outputs = list(engine.generate_batch(inputs, params).values())
        failed = outputs.pop(2)
        assert failed.status == RequestStatus.FAILED
        assert failed.error is not None and failed.generated_tokens == []
        assert "logits must be finite, got NaN or infinity after 20 tok" in failed.error
        assert failed.num_shared_tokens == 0
        assert [output.generated_tokens for output in outputs] == expected
    assert engine.stats.num_failed_steps == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_bans_every_token_fails_alone(
    paged, prompts, expected, temperature
):
    banned = [[token] for token in range(257)] + [[prompts[1][-1], 257]]
    bad = SamplingParams(
        temperature=temperature, bad_words_ids=banned, eos_token_ids=(), logprobs=1
    )
    engine = engine_of(paged)
    params = [GREEDY, GREEDY, bad, GREEDY]
    inputs = [prompts[0], prompts[3], prompts[1], prompts[2]]
    outputs = list(engine.generate_batch(inputs, params).values())
    failed = outputs.pop(2)
    assert failed.status == RequestStatus.FAILED and failed.generated_tokens == []
    assert failed.error is not None and "got none after 0 new tokens" in failed.error
    assert [output.generated_tokens for output in outputs] == [
        expected[0],
        expected[3],
        expected[2],
    ]
    assert engine.stats.num_failed_steps == 0
    assert engine.scheduler.allocator.num_held == 0


def test_an_error_before_a_step_is_planned_fails_its_requests(
    paged, prompts, expected, monkeypatch
):
    def fail():
        raise ZeroDivisionError("adapters")

    engine = engine_of(paged)
    monkeypatch.setattr(engine._model_version, "key", fail)
    outputs = engine.generate_batch(prompts, GREEDY).values()
    assert [output.error for output in outputs] == ["ZeroDivisionError: adapters"] * 4
    monkeypatch.undo()
    assert tokens_of(engine.generate_batch(prompts, GREEDY)) == expected

"""The attention function: what it forwards, and what it refuses to get wrong."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import torch_rpa
from torch_rpa.transformers import (
    RaggedBatch,
    RPAContext,
    empty_kv_caches,
    rpa_attention,
    use_rpa,
)

NUM_TOKENS, NUM_HEADS, HEAD_DIM = 3, 4, 32
SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 20},
    "gpt_oss": {
        "sliding_window": 4,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "granite": {"attention_multiplier": 0.3},
}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def one_sequence(num_new: int, kv_len: int) -> RaggedBatch:
    """A batch of one sequence that owns the pages 1 and 0, of 8 tokens each."""
    return RaggedBatch(int32(kv_len), int32(1, 0), int32(0, num_new), int32(0, 0, 1))


def build(family: str):
    config = AutoConfig.for_model(family, **SMALL, **FAMILIES[family])
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_eager_attention_in_every_phase(family):
    model = build(family)
    tokens = torch.randint(0, 64, (1, 14))
    expected = model(tokens, use_cache=False).logits
    caches = empty_kv_caches(use_rpa(model), 2, 8, dtype=torch.float32, device="cpu")
    got = []
    for start, stop in ((0, 6), (6, 11), (11, 12), (12, 13), (13, 14)):
        context = RPAContext(caches, one_sequence(stop - start, stop))
        positions = torch.arange(start, stop)[None]
        got.append(
            model(
                input_ids=tokens[:, start:stop],
                position_ids=positions,
                use_cache=False,
                rpa=context,
            ).logits
        )
    # Both sum in float32, in different orders.
    bound = 64 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (torch.cat(got, dim=1) - expected).abs().max() <= bound


def module_of(**attributes) -> Any:
    config = SimpleNamespace(**attributes.pop("config", {}))
    defaults = {"layer_idx": 0, "is_causal": True, "training": False}
    return SimpleNamespace(config=config, **{**defaults, **attributes})


def checked(context: RPAContext) -> RPAContext:
    """Says that a model has checked its call."""
    context.checked_by.add("a test")
    return context


def call(
    module: Any = None,
    rpa: Any = "default",
    num_keys: int = NUM_TOKENS,
    batch: int = 1,
    mask: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """Calls the attention function on one new sequence of three tokens."""
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(batch, NUM_HEADS, NUM_TOKENS, HEAD_DIM, generator=generator)
    key, value = torch.randn(2, batch, 2, num_keys, HEAD_DIM, generator=generator)
    if rpa == "default":
        cache = torch_rpa.empty_kv_cache(2, 8, 2, HEAD_DIM, dtype=torch.float32)
        rpa = checked(RPAContext([cache], one_sequence(NUM_TOKENS, NUM_TOKENS)))
    module = module or module_of()
    return rpa_attention(module, query, key, value, mask, rpa=rpa, **kwargs)[0]


# What layer 1 of two has, and how its scales may be given.
SCALES_OF_LAYERS: dict[str, tuple[Any, Any]] = {
    "one number": (0.25, 0.25),
    "one tensor": (0.25, torch.tensor(0.25)),
    "numbers": (0.25, [2.0, 0.25]),
    "layers": (0.25, torch.tensor([2.0, 0.25])),
    "heads": ([0.25, 0.5], torch.tensor([[2.0, 4.0], [0.25, 0.5]])),
    "tensors": ([0.25, 8.0], [torch.tensor(2.0), torch.tensor([0.25, 8.0])]),
}


@pytest.mark.parametrize("name", SCALES_OF_LAYERS)
def test_each_layer_has_its_scales(name):
    def stored(**scales) -> torch.Tensor:
        cache = torch_rpa.empty_kv_cache(2, 8, 2, HEAD_DIM, dtype=torch.float32)
        batch = one_sequence(NUM_TOKENS, NUM_TOKENS)
        context = checked(RPAContext([cache] * 2, batch, **scales))
        call(module_of(layer_idx=1), context)
        return torch_rpa.unpack_kv_cache(cache, 2, HEAD_DIM)  # [N, 2, Hkv, page, D]

    of_layer, given = SCALES_OF_LAYERS[name]
    factors = torch.tensor(of_layer).expand(2)[:, None, None]
    keys, values = stored().unbind(1)
    expected = torch.stack([keys, values / factors], 1)
    assert torch.equal(stored(v_scale=given), expected)
    expected = torch.stack([keys / factors, values], 1)
    assert torch.equal(stored(k_scale=given), expected)
    assert keys.any() and values.any()


def test_scales_of_other_layers_are_refused():
    cache = torch_rpa.empty_kv_cache(2, 8, 2, HEAD_DIM, dtype=torch.float32)
    batch = one_sequence(NUM_TOKENS, NUM_TOKENS)
    context = checked(RPAContext([cache] * 2, batch, k_scale=torch.ones(3)))
    with pytest.raises(ValueError, match=r"k_scale .* each of the 2 caches, got 3"):
        call(rpa=context)
    context = checked(RPAContext([cache] * 2, batch, v_scale=torch.ones(2, 4)))
    with pytest.raises(ValueError, match=r"v_scale must .*\[Hkv\] = \[2\], got"):
        call(rpa=context)
    entries: list[Any] = [[0.5, 0.25], None]
    for entry in entries:
        context = checked(RPAContext([cache] * 2, batch, v_scale=[entry, 1.0]))
        with pytest.raises(ValueError, match="v_scale of layer 0 must be a number or"):
            call(rpa=context)


def test_what_compressed_tensors_puts_before_attention_changes_nothing():
    """It comes with a checkpoint that has scales, and holds no keys."""
    kind = type("QuantizedKVCache", (), {"__module__": "compressed_tensors.modeling"})
    assert torch.equal(call(past_key_value=kind()), call())
    other = type("QuantizedKVCache", (), {})
    with pytest.raises(NotImplementedError, match=r"passes \['past_key_value'\]"):
        call(past_key_value=other())


def test_the_layer_says_whether_its_window_slides():
    narrow, full = call(sliding_window=1), call(sliding_window=None)
    assert not torch.equal(narrow, full)
    both = {"layer_types": ["sliding_attention"], "sliding_window": 1}
    assert torch.equal(call(module_of(config=both)), narrow)
    assert torch.equal(call(module_of(config=both), sliding_window=None), narrow)
    layer_types = {**both, "layer_types": ["full_attention"]}
    assert torch.equal(call(module_of(config=layer_types)), full)
    unused = {"sliding_window": 1}
    assert torch.equal(call(module_of(config=unused), sliding_window=None), full)


def test_scaling_soft_cap_and_sinks_reach_the_operator():
    plain = call(scaling=HEAD_DIM**-0.5)
    assert torch.equal(call(), plain)
    for changed in (call(scaling=1.0), call(softcap=0.1), call(s_aux=torch.zeros(4))):
        assert not torch.equal(changed, plain)
    # A sink of -inf has no weight.
    no_sink = torch.full((4,), -torch.inf, dtype=torch.bfloat16)
    torch.testing.assert_close(call(s_aux=no_sink), plain, rtol=0, atol=1e-5)


def test_harmless_and_empty_arguments_are_ignored():
    positions = torch.arange(3)[None]
    out = call(position_ids=positions, indices=None, output_attentions=False)
    assert torch.equal(out, call())


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"rpa": None}, ValueError, "rpa must be given .* got None"),
        ({"use_cache": True}, ValueError, "use_cache must be False .*use_cache=True"),
        ({"num_keys": 7}, ValueError, "3 queries and 7 keys"),
        ({"batch": 2}, ValueError, r"\[1, T\] .* got batch size 2"),
        (
            {"mask": torch.zeros(1, 1, 3, 3)},
            NotImplementedError,
            r"attention_mask must be None: .* \[1, 1, 3, 3\]",
        ),
        ({"is_causal": False}, NotImplementedError, "asks for is_causal=False"),
        (
            {"module": module_of(is_causal=False)},
            NotImplementedError,
            "asks for is_causal=False",
        ),
        (
            {"module": module_of(config={"is_causal": False})},
            NotImplementedError,
            "asks for is_causal=False",
        ),
        ({"module": module_of(training=True)}, NotImplementedError, "training=True"),
        ({"dropout": 0.1}, NotImplementedError, "dropout=0.1.*eval"),
        (
            {"output_attentions": True},
            NotImplementedError,
            "output_attentions must be False",
        ),
        (
            {"rpa": None, "module": module_of(is_causal=False)},
            NotImplementedError,
            "leave images out",
        ),
        (
            {"position_bias": torch.zeros(1), "indices": torch.zeros(1)},
            NotImplementedError,
            r"passes \['indices', 'position_bias'\]",
        ),
        (
            {"module": module_of(config={"layer_types": ["chunked_attention"]})},
            NotImplementedError,
            "full or sliding attention, got 'chunked_attention'",
        ),
        (
            {"module": module_of(config={"sliding_window": 4})},
            NotImplementedError,
            "does not pass sliding_window",
        ),
    ],
)
def test_what_could_change_the_answer_is_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        call(**kwargs)


def test_a_model_without_a_context_is_refused():
    model = use_rpa(build("llama"))
    with pytest.raises(ValueError, match="rpa must be given"):
        model(torch.tensor([[1, 2]]))


@torch.no_grad()
def test_a_decoder_that_its_config_makes_an_encoder_is_refused():
    """transformers says so in a mask alone, which it does not build."""
    model = use_rpa(build("llama"))
    model.config.is_causal = False
    caches = empty_kv_caches(model, 2, 8, dtype=torch.float32, device="cpu")
    context = RPAContext(caches, one_sequence(2, 2))
    with pytest.raises(NotImplementedError, match="asks for is_causal=False"):
        model(torch.tensor([[1, 2]]), use_cache=False, rpa=context)


def test_autocast_and_float16_are_refused():
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(NotImplementedError, match=r"torch\.autocast must be off"),
    ):
        call()
    half = torch.zeros(1, 2, 3, HEAD_DIM, dtype=torch.float16)
    with pytest.raises(
        NotImplementedError, match=r"load it with dtype=torch\.bfloat16"
    ):
        context = checked(RPAContext([], one_sequence(3, 3)))
        rpa_attention(module_of(), half, half, half, None, rpa=context)
    with pytest.raises(
        NotImplementedError, match=r"load it with dtype=torch\.bfloat16"
    ):
        empty_kv_caches(build("llama").half(), 2, 8, dtype=torch.bfloat16, device="cpu")


def test_a_gradient_is_refused():
    model = use_rpa(build("llama"))
    caches = empty_kv_caches(model, 2, 8, dtype=torch.float32, device="cpu")
    context = RPAContext(caches, one_sequence(2, 2))
    with pytest.raises(NotImplementedError, match="no_grad"):
        model(torch.tensor([[1, 2]]), use_cache=False, rpa=context)


def test_a_model_with_attention_of_its_own_is_refused():
    class Stubborn(Any):
        config = build("llama").config

        def set_attn_implementation(self, name):
            """Ignores the request, as transformers does for such models."""

    with pytest.raises(NotImplementedError, match="Stubborn keeps its own attention"):
        use_rpa(Stubborn())


def test_a_model_without_attention_layers_has_no_caches():
    with pytest.raises(NotImplementedError, match="attention module for each layer"):
        empty_kv_caches(torch.nn.Linear(1, 1), 2, 8, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("guarded_by", ["use_rpa", "empty_kv_caches"])
def test_a_padding_mask_beside_the_context_is_refused(guarded_by):
    model = build("llama")
    model.set_attn_implementation("rpa")
    if guarded_by == "use_rpa":
        use_rpa(model)
        caches = [torch_rpa.empty_kv_cache(2, 8, 2, HEAD_DIM, dtype=torch.float32)] * 4
    else:
        caches = empty_kv_caches(model, 2, 8, dtype=torch.float32, device="cpu")
    tokens, mask = torch.tensor([[1, 2]]), torch.tensor([[0, 1]])
    keywords = {"use_cache": False, "rpa": RPAContext(caches, one_sequence(2, 2))}
    for arguments in (((tokens,), {"attention_mask": mask}), ((tokens, mask), {})):
        with pytest.raises(NotImplementedError, match="attention_mask must be None"):
            model(*arguments[0], **arguments[1], **keywords)


def test_a_context_for_another_attention_is_refused():
    model = use_rpa(build("llama"))
    caches = empty_kv_caches(model, 2, 8, dtype=torch.float32, device="cpu")
    model.set_attn_implementation("eager")
    context = RPAContext(caches, one_sequence(2, 2))
    with pytest.raises(ValueError, match="'rpa', got 'eager'"):
        model(torch.tensor([[1, 2]]), use_cache=False, rpa=context)


def test_a_second_attention_of_one_layer_is_refused():
    context = RPAContext(
        [torch_rpa.empty_kv_cache(2, 8, 2, HEAD_DIM, dtype=torch.float32)],
        one_sequence(NUM_TOKENS, NUM_TOKENS),
    )
    call(rpa=checked(context))
    with pytest.raises(NotImplementedError, match=r"layer 0 of .* a second time"):
        call(rpa=context)


@torch.no_grad()
def test_a_context_serves_several_calls_of_a_watched_model():
    model = use_rpa(build("llama"))
    caches = empty_kv_caches(model, 2, 8, dtype=torch.float32, device="cpu")
    context = RPAContext(caches, one_sequence(2, 2))
    first, second = (
        model(torch.tensor([[1, 2]]), use_cache=False, rpa=context).logits
        for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_beside_the_context_is_refused(name):
    model = use_rpa(build("llama"))
    caches = empty_kv_caches(model, 2, 8, dtype=torch.float32, device="cpu")
    keywords = {name: DynamicCache(), "rpa": RPAContext(caches, one_sequence(2, 2))}
    with pytest.raises(ValueError, match=r"past_key_values must be None.*DynamicCache"):
        model(torch.tensor([[1, 2]]), use_cache=False, **keywords)


@torch.no_grad()
def test_what_a_model_checks_is_no_break_of_a_graph(monkeypatch):
    # torch 2.9 itself cannot trace the question for autocast; later releases can.
    name = "torch_rpa.transformers.attention.refuse_autocast"
    monkeypatch.setattr(name, lambda device: None)
    model = use_rpa(build("llama"))
    caches = empty_kv_caches(model, 2, 8, dtype=torch.float32, device="cpu")
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    expected, got = (
        function(
            torch.tensor([[1, 2]]),
            position_ids=torch.arange(2)[None],
            use_cache=False,
            rpa=RPAContext(caches, one_sequence(2, 2)),
        ).logits
        for function in (model, compiled)
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_other_scales_of_layers_need_no_other_graph(monkeypatch):
    # As in the test before.
    name = "torch_rpa.transformers.attention.refuse_autocast"
    monkeypatch.setattr(name, lambda device: None)
    model = use_rpa(build("llama"))
    caches = empty_kv_caches(model, 2, 8, dtype=torch.int8, device="cpu")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    seen = []
    for scale in (1 / 16, 1 / 8):
        scales = torch.tensor([scale, 2 * scale, scale, 2 * scale])
        expected, got = (
            function(
                torch.tensor([[1, 2]]),
                position_ids=torch.arange(2)[None],
                use_cache=False,
                rpa=RPAContext(
                    caches,
                    one_sequence(2, 2),
                    k_scale=scales,
                    v_scale=[*scales[:, None].expand(4, 2)],
                ),
            ).logits
            for function in (model, compiled)
        )
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        seen.append(got)
    assert counter.frame_count == 1
    assert not torch.equal(*seen)

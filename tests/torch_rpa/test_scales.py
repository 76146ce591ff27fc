"""Measured scales are those of the keys and values that transformers would cache."""

import pytest
import torch

import torch_rpa
from tests.support.tiny_llama import VOCABULARY, build_llama
from tests.transformers.routes import CACHE
from torch_rpa.generate.constants import DEFAULT_PROMPTS
from torch_rpa.generate.models import load_model
from torch_rpa.generate.tokenizer import ByteTokenizer
from torch_rpa.serving import Engine, EngineOptions, SamplingParams

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], list(range(40, 57))]
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448, torch.float8_e5m2: 57344}
XLA = pytest.param("xla", marks=[pytest.mark.torch_xla, pytest.mark.slow])


def largest_cached(model, prompts) -> list[float]:
    """Returns the largest key and value in transformers' own cache."""
    largest = [0.0, 0.0]
    for prompt in prompts:
        with torch.no_grad():
            cache = model(torch.tensor([prompt]), use_cache=True)[CACHE]
        for layer in cache.layers:
            for index, entries in enumerate((layer.keys, layer.values)):
                largest[index] = max(largest[index], entries.abs().max().item())
    return largest


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("attention", ["eager", "rpa"])
def test_scales_spread_the_largest_entries_over_the_dtype(dtype, attention):
    model = build_llama(attention)
    scales = torch_rpa.measure_kv_scales(model, PROMPTS, dtype=dtype)
    largest = largest_cached(build_llama("eager"), PROMPTS)
    expected = [1.05 * entry / LARGEST[dtype] for entry in largest]
    assert scales == pytest.approx(expected, rel=1e-5)
    assert scales.k_scale == scales[0]
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("device", ["cpu", XLA])
def test_padding_of_steps_does_not_count(device):
    model = build_llama("eager")
    with torch.no_grad():  # the token of padding gets a large key
        keys = model.model.layers[0].self_attn.k_proj.weight
        model.model.embed_tokens.weight[0] = 9 * keys[0]
    expected = largest_cached(model, PROMPTS)[0]
    assert largest_cached(model, [*PROMPTS, [0]])[0] > 1.5 * expected
    if device == "xla":
        import torch_xla

        model.to(torch_xla.device())
        model.tie_weights()
    prompts = [torch.tensor(prompt) for prompt in PROMPTS]
    scales = torch_rpa.measure_kv_scales(model, prompts, dtype=torch.int8)
    assert scales.k_scale == pytest.approx(1.05 * expected / 127, rel=1e-4)


def test_values_that_are_all_zero_need_no_scale():
    model = build_llama("rpa")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.v_proj.weight)
    scales = torch_rpa.measure_kv_scales(model, PROMPTS, dtype=torch.int8)
    assert scales.v_scale == 1.0 != scales.k_scale


def test_int8_with_measured_scales_writes_the_text_of_float32():
    tokenizer = ByteTokenizer()

    def texts(**options):
        model = load_model(None, "rpa", torch.float32)
        engine = Engine(model, EngineOptions(device="cpu", **options))
        outputs = engine.generate_batch(prompts, SamplingParams(max_new_tokens=16))
        return [output.generated_tokens for output in outputs.values()]

    prompts = [tokenizer.encode(text) for text in DEFAULT_PROMPTS]
    expected = texts()
    model = load_model(None, "eager", torch.float32)
    scales = torch_rpa.measure_kv_scales(model, prompts, dtype=torch.int8)
    assert texts(cache_dtype=torch.int8, **scales._asdict()) == expected
    unscaled = texts(cache_dtype=torch.int8, k_scale=1.0, v_scale=1.0)
    assert unscaled != expected


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts must have at least one, got none"),
        ([[1], []], r"prompts must be .* one token id or more.* got \[\] among them"),
        (["text"], "prompts must be lists or tensors .* got 'text'"),
        ([[VOCABULARY]], f"from 0 to {VOCABULARY - 1}, got .{VOCABULARY}. among"),
        ([torch.ones(1, 2)], "prompts must be lists or tensors"),
    ],
)
def test_prompts_that_are_none_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        torch_rpa.measure_kv_scales(build_llama("rpa"), prompts, dtype=torch.int8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, "int8"])
def test_dtypes_that_need_no_scales_are_refused(dtype):
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float8_e4m3fn"):
        torch_rpa.measure_kv_scales(build_llama("rpa"), PROMPTS, dtype=dtype)


def test_a_model_that_trains_or_has_no_numbers_is_refused():
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model = build_llama("rpa").train()
        torch_rpa.measure_kv_scales(model, PROMPTS, dtype=torch.int8)
    model = build_llama("eager")
    torch.nn.init.constant_(model.model.layers[0].self_attn.k_proj.weight, torch.nan)
    with pytest.raises(ValueError, match=r"finite keys and values.*key=nan"):
        torch_rpa.measure_kv_scales(model, PROMPTS, dtype=torch.int8)
    assert model.config._attn_implementation == "eager"

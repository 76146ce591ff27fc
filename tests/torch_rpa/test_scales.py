"""Measured scales are those of the keys and values that transformers would cache."""

from typing import Any, get_args

import pytest
import torch

import torch_rpa
from tests.support.tiny_llama import VOCABULARY, build_llama
from tests.transformers.routes import CACHE
from torch_rpa.generate.constants import DEFAULT_PROMPTS
from torch_rpa.generate.models import load_model
from torch_rpa.generate.tokenizer import ByteTokenizer
from torch_rpa.scales import Granularity
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


@pytest.mark.parametrize("attention", ["eager", "rpa"])
def test_each_layer_or_head_has_a_scale_of_its_own(attention):
    expected = []  # keys and values, [Hkv] for each layer
    for prompt in PROMPTS:
        with torch.no_grad():
            cache = build_llama("eager")(torch.tensor([prompt]), use_cache=True)[CACHE]
        expected.append(
            torch.stack([torch.stack([x.keys, x.values]) for x in cache.layers], 1)
            .abs()
            .amax(dim=(2, 4, 5))
        )
    heads = torch.stack(expected).amax(dim=0) * 1.05 / 127  # [2, layers, Hkv]
    model = build_llama(attention)
    scales: Any = [
        torch_rpa.measure_kv_scales(model, PROMPTS, dtype=torch.int8, granularity=name)
        for name in get_args(Granularity)
    ]
    of_model, of_layers, of_heads = scales
    torch.testing.assert_close(torch.stack(of_heads), heads)
    torch.testing.assert_close(torch.stack(of_layers), heads.amax(dim=2))
    assert of_model == pytest.approx(heads.amax(dim=(1, 2)).tolist(), rel=1e-5)


@pytest.mark.parametrize("granularity", get_args(Granularity))
def test_saved_scales_are_the_same_after_loading(granularity, tmp_path):
    model = build_llama("rpa")
    scales = torch_rpa.measure_kv_scales(
        model, PROMPTS, dtype=torch.int8, granularity=granularity
    )
    scales.save(tmp_path / "scales.json")
    loaded = torch_rpa.KVScales.load(tmp_path / "scales.json")
    torch.testing.assert_close(tuple(loaded), tuple(scales), rtol=0, atol=0)


def test_layers_of_other_heads_are_saved_and_moved():
    heads = (torch.tensor([0.5, 0.25]), torch.tensor([2.0]))
    scales: Any = torch_rpa.KVScales(heads, 0.5).to("meta")
    assert [x.shape for x in scales.k_scale] == [(2,), (1,)] and scales.v_scale == 0.5
    assert {x.device.type for x in scales.k_scale} == {"meta"}


def test_scales_of_layers_of_other_heads_are_loaded(tmp_path):
    heads = (torch.tensor([0.5, 0.25]), torch.tensor([2.0]))
    torch_rpa.KVScales(heads, 0.5).save(tmp_path / "scales.json")
    loaded: Any = torch_rpa.KVScales.load(tmp_path / "scales.json")
    assert loaded.v_scale == 0.5 and len(loaded.k_scale) == 2
    assert all(map(torch.equal, loaded.k_scale, heads))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k_scale: 1", "expected scales in JSON, got Expecting value"),
        ("[1, 1]", r"an object with k_scale and v_scale, got \[1, 1\]"),
        ('{"k_scale": 1}', r"k_scale and v_scale, got \['k_scale'\]"),
        ('{"k_scale": 1, "v_scale": null}', "v_scale must be a number or numbers, got"),
        ('{"k_scale": [], "v_scale": 1}', r"k_scale must be a number or .* got \[\]"),
        ("[" * 100_000, "expected scales in JSON, got maximum recursion"),
        ('{"k_scale": 0, "v_scale": 1}', "k_scale must be a positive .* got 0"),
        ('{"k_scale": [1, [-1]], "v_scale": 1}', "k_scale of layer 1 .* got -1"),
        ('{"k_scale": 1, "v_scale": ["1"]}', "v_scale of layer 0 must .* got '1'"),
    ],
)
def test_files_with_something_else_are_refused(text, message, tmp_path):
    (tmp_path / "file.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"file\.json: .*{message}"):
        torch_rpa.KVScales.load(tmp_path / "file.json")


@pytest.mark.parametrize("scales", [None, torch.ones(0)])
def test_what_could_not_be_loaded_is_not_saved(scales, tmp_path):
    with pytest.raises(ValueError, match="v_scale must be a number or numbers, got"):
        torch_rpa.KVScales(0.5, scales).save(tmp_path / "scales.json")
    assert not [*tmp_path.iterdir()]


def test_other_granularities_are_refused():
    model = build_llama("rpa")
    with pytest.raises(ValueError, match="'model', 'layer', 'head', got 'token'"):
        torch_rpa.measure_kv_scales(
            model,
            PROMPTS,
            dtype=torch.int8,
            granularity="token",  # pyright: ignore[reportArgumentType]
        )


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
    for granularity in get_args(Granularity):
        scales = torch_rpa.measure_kv_scales(
            model, prompts, dtype=torch.int8, granularity=granularity
        )
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

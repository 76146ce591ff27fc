"""Checkpoints of vision and language: text runs, and images are refused by name."""

import os
import re
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from tests.transformers.families import ALTERNATING, SMALL, WIDE
from tests.transformers.routes import (
    custom_generate,
    eager_generate,
    generate_in_block,
    padded,
)
from torch_rpa.transformers import (
    RaggedBatch,
    RPAContext,
    empty_kv_caches,
    use_rpa,
)

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(
    VERSION < (5, 24), reason="the small configs are those of transformers 5.24"
)

IMAGE = 62
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 1,
    "intermediate_size": 32,
    "out_hidden_size": 64,
    "patch_size": 14,
    "deepstack_visual_indexes": [],
}
SECTIONS = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
GEMMA_TEXT = {**SMALL, **ALTERNATING, "model_type": "gemma3_text"}
MODELS = {
    "gemma3": (
        GEMMA_TEXT,
        {**VISION, "model_type": "siglip_vision_model"},
        {"mm_tokens_per_image": 4},
    ),
    "gemma4": (
        {
            **GEMMA_TEXT,
            "model_type": "gemma4_text",
            "global_head_dim": 32,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 0,
        },
        {**VISION, "num_key_value_heads": 1, "head_dim": 32},
        {"audio_config": None},
    ),
    "qwen3_vl": (
        {**SMALL, "model_type": "qwen3_vl_text", "rope_scaling": SECTIONS},
        QWEN_VISION,
        {"video_token_id": 61, "vision_start_token_id": 60},
    ),
    "qwen2_5_vl": (
        {
            **SMALL,
            **WIDE,
            "model_type": "qwen2_5_vl_text",
            "rope_parameters": SECTIONS,
        },
        {**QWEN_VISION, "out_hidden_size": 128, "fullatt_block_indexes": [0]},
        {"video_token_id": 61, "vision_start_token_id": 60},
    ),
    "fuyu": (
        {**SMALL, **WIDE, "model_type": "persimmon"},
        {},
        {"patch_size": 4, **WIDE},
    ),
    "paligemma": (
        {**SMALL, "model_type": "gemma"},
        {**VISION, "model_type": "siglip_vision_model"},
        {"projection_dim": 64},
    ),
    "llava": (
        {**SMALL, "model_type": "llama"},
        {**VISION, "model_type": "clip_vision_model"},
        {"vision_feature_layer": -1},
    ),
    "mistral3": (
        {**SMALL, "model_type": "mistral", "sliding_window": None},
        {**VISION, "model_type": "pixtral"},
        {},
    ),
}
# What processors give beside text without images.
NO_IMAGES = {"gemma3": "token_type_ids", "gemma4": "mm_token_type_ids"}


def build(name):
    text, vision, more = MODELS[name]
    config = AutoConfig.for_model(
        name, text_config=text, vision_config=vision, image_token_id=IMAGE, **more
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForImageTextToText.from_config(
            config, attn_implementation="eager", dtype=torch.float32
        )
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval()


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"paligemma"}))
def test_text_alone_gives_the_tokens_of_eager(name):
    model, inputs = build(name), padded()
    if name in NO_IMAGES:
        inputs[NO_IMAGES[name]] = torch.zeros_like(inputs["input_ids"])
    keywords = {"max_new_tokens": 5}
    expected = eager_generate(model, inputs, **keywords)
    assert len(expected[:, 21:].unique()) > 3
    use_rpa(model)
    for route in (custom_generate, generate_in_block):
        assert torch.equal(route(model, inputs, **keywords), expected)


def inputs_with_an_image():
    ids = torch.tensor([[5, 60, *[IMAGE] * 4, 61, 7, 8, 9]])
    return {
        "input_ids": ids,
        "token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.ones(1, 3, 28, 28),
    }


@pytest.mark.parametrize("route", [custom_generate, generate_in_block])
def test_images_are_refused(route):
    model = use_rpa(build("gemma3"))
    with pytest.raises(NotImplementedError, match="leave images out"):
        route(model, inputs_with_an_image())
    model.set_attn_implementation({"text_config": "rpa", "vision_config": "eager"})
    with pytest.raises(
        NotImplementedError, match=r"'mm_encoder_outputs', 'token_type_ids'.*no images"
    ):
        route(model, inputs_with_an_image())


def context_of(model):
    """A watched model's context for ten new tokens in two pages."""
    caches = empty_kv_caches(model, 4, 8, dtype=torch.float32, device="cpu")
    tensors = ([10], [0, 1], [0, 10], [0, 0, 1])
    batch = RaggedBatch(*(torch.tensor(t, dtype=torch.int32) for t in tensors))
    return RPAContext(caches, batch)


def call(model, context, **inputs):
    positions = torch.arange(10)[None]
    return model(**inputs, position_ids=positions, use_cache=False, rpa=context)


def build_with_eager_vision(name):
    model = build(name)
    model.set_attn_implementation({"text_config": "rpa", "vision_config": "eager"})
    return model


@pytest.mark.parametrize("entry", ["", "model"])
@torch.no_grad()
def test_a_span_of_an_image_beside_a_context_is_refused(entry):
    """transformers would let its tokens attend in both directions, by a mask."""
    model = build_with_eager_vision("gemma3")
    context = context_of(model)
    with pytest.raises(NotImplementedError, match="token_type_ids must be left out"):
        call(model.get_submodule(entry), context, **inputs_with_an_image())


@torch.no_grad()
def test_a_span_in_a_model_that_nobody_watches_is_refused():
    context = context_of(build_with_eager_vision("gemma3"))
    with pytest.raises(ValueError, match=r"must be watched.*use_rpa\(model\)"):
        call(build_with_eager_vision("gemma3"), context, **inputs_with_an_image())


@pytest.mark.parametrize("entry", ["", "model", "model.language_model"])
@torch.no_grad()
def test_text_beside_a_context_gives_the_numbers_of_eager(entry):
    model = build("gemma3")
    inputs = {"input_ids": torch.arange(5, 15)[None]}
    if entry != "model.language_model":
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    expected = model.get_submodule(entry)(**inputs)[0]
    context = context_of(use_rpa(model))
    got = call(model.get_submodule(entry), context, **inputs)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("types", [None, [0] * 7 + [1] * 3])
@torch.no_grad()
def test_a_prefix_that_attends_in_both_directions_is_refused(types):
    """Without types too: what transformers computes then depends on the attention."""
    model = build_with_eager_vision("paligemma")
    inputs = {"input_ids": torch.arange(5, 15)[None]}
    if types:
        inputs["token_type_ids"] = torch.tensor([types])
    with pytest.raises(NotImplementedError, match="only causal attention can be paged"):
        call(model, context_of(model), **inputs)


# Modules of transformers that change causal masks by functions, which reach no
# attention function without masks, and why none of them changes an answer silently.
CHANGED_MASKS = {
    "deepseek_ocr2": "an encoder, whose layers are those of the text a first time",
    "diffusion_gemma": "is_causal=False",
    "esmc": "is_causal=False",
    "esmfold2": "is_causal=False",
    "gemma3": "types of tokens",
    "gemma4": "types of tokens",
    "gemma4_unified": "types of tokens",
    "git": "is_causal=False",
    "hrm_text": "types of tokens",
    "llama4": "a kind of layers",
    "molmo2": "types of tokens",
    "moonshine_streaming": "an encoder, with is_causal=False",
    "nemotron_asr_streaming": "is_causal=False",
    "paligemma": "is_causal=False, and types of tokens",
    "pi0": "is_causal=False",
    "step3p7": "a switch of its config that is off in all of them",
    "t5gemma2": "is_causal=False",
    "unlimited_ocr": "a kind of layers",
}


@pytest.mark.skipif(VERSION != (5, 24), reason="the list is that of transformers 5.24")
def test_every_family_with_a_mask_of_its_own_is_known():
    functions = re.compile(
        "or_mask_function|and_mask_function|block_sequence_ids|create_chunked_causal"
    )
    models = Path(transformers.__file__).parent / "models"
    files = models.glob("*/modeling_*.py")
    found = {f.parent.name for f in files if functions.search(f.read_text("utf-8"))}
    assert found == set(CHANGED_MASKS)

"""Checkpoints of vision and language: text runs, and images are refused by name."""

import os

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


@pytest.mark.parametrize("name", MODELS)
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


@torch.no_grad()
def test_a_span_of_an_image_beside_a_context_is_refused():
    """transformers would let its tokens attend in both directions, by a mask."""
    model = build("gemma3")
    model.set_attn_implementation({"text_config": "rpa", "vision_config": "eager"})
    caches = empty_kv_caches(model, 4, 8, dtype=torch.float32, device="cpu")
    tensors = ([10], [0, 1], [0, 10], [0, 0, 1])
    batch = RaggedBatch(*(torch.tensor(t, dtype=torch.int32) for t in tensors))
    inputs = inputs_with_an_image()
    inputs["position_ids"] = torch.arange(10)[None]
    with pytest.raises(NotImplementedError, match="token_type_ids must be left out"):
        model(**inputs, use_cache=False, rpa=RPAContext(caches, batch))

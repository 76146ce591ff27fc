"""Checkpoints of compressed-tensors with scales of their cache, if it is installed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import importlib.util
import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import torch_rpa
from tests.transformers.routes import build, custom_generate, padded
from torch_rpa.transformers import use_rpa

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed",
)
# By strategy of the tool: the shape of a layer's scales.
SHAPES = {"tensor": (1,), "attn_head": (2, 1, 1)}
SCHEME = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}


@pytest.mark.parametrize("strategy", SHAPES)
def test_scales_of_a_checkpoint_are_read_and_used(strategy, tmp_path):
    model = build("rpa")
    tensors = dict(model.state_dict())
    for layer in range(2):
        for name in ("k_scale", "v_scale"):
            scale = torch.full(SHAPES[strategy], (1 + layer) / 64)
            tensors[f"model.layers.{layer}.self_attn.{name}"] = scale
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    quantisation = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "frozen",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": {**SCHEME, "strategy": strategy},
    }
    config = {**model.config.to_dict(), "quantization_config": quantisation}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    quantised.generation_config = model.generation_config

    scales = torch_rpa.read_kv_scales(quantised)
    of_folder = torch_rpa.read_kv_scales(tmp_path)
    torch.testing.assert_close(tuple(scales), tuple(of_folder), rtol=0, atol=0)
    shape = (2,) if strategy == "tensor" else (2, 2)
    assert [torch.as_tensor(x).shape for x in scales] == [shape, shape]

    options = {"cache_dtype": torch.float8_e4m3fn, **scales._asdict()}
    got = custom_generate(use_rpa(quantised), padded(), **options)
    assert torch.equal(got, custom_generate(model, padded(), **options))

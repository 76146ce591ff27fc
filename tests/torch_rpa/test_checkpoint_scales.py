"""Scales are found in checkpoints under the names of the tools that make them."""

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import torch_rpa
from tests.support.tiny_llama import build_llama

# The names of keys and values after that of a layer.
TOOLS = {
    "compressed-tensors": ("self_attn.k_scale", "self_attn.v_scale"),
    "ModelOpt": ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
    "Quark": ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
    "Quark in a model": (
        "self_attn.k_proj.output_quantizer.scale",
        "self_attn.v_proj.output_quantizer.scale",
    ),
}
K_SCALE, V_SCALE = torch.tensor([0.5, 0.25, 0.125]), torch.tensor([2.0, 4.0, 8.0])
# What stands beside them in such checkpoints and is something else.
OTHERS = {
    "model.layers.0.self_attn.q_proj.output_scale": torch.tensor(9.0),
    "model.layers.0.self_attn.k_proj.weight_scale": torch.tensor(9.0),
    "model.layers.0.self_attn.k_proj.input_scale": torch.tensor(9.0),
    "model.layers.0.self_attn.k_norm.weight": torch.ones(4),
    "model.layers.0.mlp.experts.1.up_proj.weight_scale": torch.ones(4, 1),
    "model.layers.0.self_attn.v_zero_point": torch.zeros(1),
}


def checkpoint(tool: str = "compressed-tensors") -> dict[str, torch.Tensor]:
    names = TOOLS[tool]
    return OTHERS | {
        f"model.layers.{layer}.{name}": scales[layer].reshape(1)
        for name, scales in zip(names, (K_SCALE, V_SCALE), strict=True)
        for layer in range(len(scales))
    }


@pytest.mark.parametrize("tool", TOOLS)
def test_names_of_every_tool_are_known(tool):
    scales: Any = torch_rpa.read_kv_scales(checkpoint(tool))
    assert torch.equal(torch.stack(scales), torch.stack([K_SCALE, V_SCALE]))


def test_one_scale_may_serve_keys_and_values():
    names = [f"model.layers.{i}.self_attn.kv_scale" for i in range(3)]
    scales: Any = torch_rpa.read_kv_scales(dict(zip(names, K_SCALE, strict=True)))
    assert torch.equal(torch.stack(scales), torch.stack([K_SCALE, K_SCALE]))


@pytest.mark.parametrize("shape", [(2,), (2, 1, 1)])
def test_each_key_head_may_have_its_own(shape):
    heads = torch.tensor([[0.5, 2.0], [0.25, 4.0]], dtype=torch.bfloat16)
    found: Any = torch_rpa.read_kv_scales(
        {
            f"layers.{layer}.attention.{which}_scale": heads[layer].reshape(shape)
            for which in "kv"
            for layer in (1, 0)
        }
    )
    assert torch.equal(torch.stack(found), heads.float().expand(2, 2, 2))


def test_files_of_safetensors_are_read(tmp_path):
    tensors = checkpoint()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        file = tmp_path / f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, file)
    scales: Any = torch_rpa.read_kv_scales(tmp_path)
    assert torch.equal(torch.stack(scales), torch.stack([K_SCALE, V_SCALE]))
    save_file(tensors, tmp_path / "all.safetensors")
    scales = torch_rpa.read_kv_scales(str(tmp_path / "all.safetensors"))
    assert torch.equal(torch.stack(scales), torch.stack([K_SCALE, V_SCALE]))


def test_parameters_of_a_model_are_read_and_numbers_are_not():
    model = build_llama("rpa")
    for layer in model.model.layers:
        layer.self_attn.k_scale = 3.0  # as Gemma 4, a factor of its keys
    with pytest.raises(ValueError, match="got none in its names"):
        torch_rpa.read_kv_scales(model)
    for layer in model.model.layers:
        del layer.self_attn.k_scale
        for name in ("k_scale", "v_scale"):
            scale = torch.nn.Parameter(torch.tensor([0.5]), requires_grad=False)
            layer.self_attn.register_parameter(name, scale)
    scales: Any = torch_rpa.read_kv_scales(model)
    assert [x.tolist() for x in scales] == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"model.layers.1.self_attn.k_scale": None},
            ValueError,
            r"k_scale of all 3 layers of model\.layers\., got none of \[1\]",
        ),
        (
            {"model.layers.999999999.self_attn.k_scale": torch.ones(1)},
            ValueError,
            r"all 1000000000 layers .* got none of \[3, 4, .*, 10\] and maybe others",
        ),
        (
            {"model.layers.1.self_attn.kv_scale": torch.ones(1)},
            ValueError,
            r"got model\.layers\.1\.self_attn\.kv_scale = 1\.0 beside 0\.25",
        ),
        (
            {"model.layers.1.self_attn.k_scale": 0.5},
            ValueError,
            r"layers\.1\.self_attn\.k_scale must be a tensor, got 0\.5",
        ),
        (
            {"other.layers.0.self_attn.k_scale": torch.ones(1)},
            ValueError,
            r"of one model, got those of \['model.layers.', 'other.layers.'\]",
        ),
        (
            {"model.layers.1.self_attn.k_scale": torch.zeros(1)},
            ValueError,
            "k_scale of layer 1 must be a positive",
        ),
        (
            {"model.layers.1.self_attn.v_scale": torch.ones(2, 64)},
            NotImplementedError,
            r"v_scale must .* got shape \[2, 64\].*measure_kv_scales",
        ),
        (
            {"model.layers.0.self_attn.v_zero_point": torch.ones(1)},
            NotImplementedError,
            "layers.0.self_attn.v_zero_point must be 0",
        ),
    ],
)
def test_scales_that_would_change_their_meaning_are_refused(changes, error, message):
    tensors = {k: x for k, x in (checkpoint() | changes).items() if x is not None}
    with pytest.raises(error, match=message):
        torch_rpa.read_kv_scales(tensors)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"source must be a folder .* got 3"):
        torch_rpa.read_kv_scales(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"a folder or a file .* got '.*config\.json'"):
        torch_rpa.read_kv_scales(tmp_path / "config.json")
    with pytest.raises(ValueError, match="got none in "):
        torch_rpa.read_kv_scales(tmp_path)


def test_files_of_a_folder_may_repeat_scales_but_not_contradict_each_other(tmp_path):
    tensors = checkpoint()
    for name in ("a", "b"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    scales: Any = torch_rpa.read_kv_scales(tmp_path)
    assert torch.equal(torch.stack(scales), torch.stack([K_SCALE, V_SCALE]))
    other = {"model.layers.2.self_attn.v_scale": torch.ones(1)}
    save_file(other, tmp_path / "c.safetensors")
    message = r"one model\.layers\.2\.self_attn\.v_scale, got .* in a.* and c\.safe"
    with pytest.raises(ValueError, match=message):
        torch_rpa.read_kv_scales(tmp_path)


@pytest.mark.parametrize("size", [0, 20, -1])
def test_a_damaged_file_is_refused_by_name(size, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(checkpoint(), file)
    file.write_bytes(file.read_bytes()[:size])
    for source in (tmp_path, file):
        with pytest.raises(
            ValueError, match=r"model\.safetensors: expected safetensors, got "
        ):
            torch_rpa.read_kv_scales(source)

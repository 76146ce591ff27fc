"""The parts of ``torch_rpa.vllm`` that need no vLLM."""

import importlib.metadata
import importlib.util
import tomllib
import types
from pathlib import Path

import pytest
import torch

from jax_kernels.contract.cache import CacheGeometry
from torch_rpa import vllm
from torch_rpa.vllm import memory, refusals
from torch_rpa.vllm.experts import mix_experts
from torch_rpa.vllm.steps import distribution_of

FOLDER = Path(vllm.__file__).parent
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("num_new", "padding", "expected"),
    [
        ([1, 1, 5], [1, 1], [2, 2, 3]),
        ([1, 1, 1], [1], [3, 3, 3]),  # dead entries look like decodes
        ([7, 1, 1], [], [0, 0, 3]),
        ([1, 4, 1], [0, 0], [1, 1, 3]),
        ([], [1, 1], [0, 0, 0]),
    ],
)
def test_sequences_that_decode_are_the_first_ones_with_one_token(
    num_new, padding, expected
):
    starts = torch.tensor([0, *num_new, *padding]).cumsum(0).int()
    distribution = distribution_of(starts, torch.tensor([len(num_new)]).int())
    assert distribution.dtype == torch.int32
    assert distribution.tolist() == expected


@pytest.mark.parametrize("head_dim", [32, 40, 64, 80, 96, 128, 192, 256, 512])
def test_pages_have_the_bytes_that_vllm_counts(head_dim):
    sizes = 10, 16, 2
    stored = memory.stored_head_dim(head_dim)
    geometry = CacheGeometry(*sizes, head_dim, "bfloat16")
    cache = torch.empty(geometry.shape, dtype=torch.bfloat16, device="meta")
    page_bytes = 2 * 16 * 2 * stored * 2  # of vllm.v1.kv_cache_interface.AttentionSpec
    assert cache.nbytes == 10 * page_bytes
    assert CacheGeometry(*sizes, stored, "bfloat16").shape == geometry.shape


def test_memory_that_vllm_takes_off_for_padding_is_given_back():
    assert memory.without_padding(3000, 96) == 4000
    assert memory.without_padding(3000, 128) == 3000


@pytest.mark.parametrize(
    ("max_model_len", "max_num_seqs", "expected"),
    [
        (256, 8, 16),
        (2048, 8, 128),
        (8192, 256, 128),
        (131072, 256, 256),
        (10**6, 512, 512),
    ],
)
def test_page_size(max_model_len, max_num_seqs, expected):
    assert memory.choose_page_size(max_model_len, max_num_seqs) == expected


def test_experts_of_gpt_oss_are_those_of_transformers():
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = gpt_oss.GptOssConfig(
        hidden_size=32,
        intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=1,
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    layer = gpt_oss.GptOssMLP(config).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(7, 32)
    with torch.no_grad():
        expected, _ = layer(x[None])
        router, experts = layer.router, layer.experts
        out = mix_experts(
            x,
            x @ router.weight.T + router.bias,
            experts.gate_up_proj.transpose(1, 2),
            experts.down_proj.transpose(1, 2),
            top_k=2,
            renormalize=True,
            activation="swigluoai",
            bias13=experts.gate_up_proj_bias,
            bias2=experts.down_proj_bias,
        )
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("renormalize", [False, True])
def test_experts_with_silu_are_the_sum_of_the_chosen_ones(renormalize):
    torch.manual_seed(0)
    x, logits = torch.randn(3, 8), torch.randn(3, 4)
    w13, w2 = torch.randn(4, 12, 8), torch.randn(4, 8, 6)
    options = {"top_k": 2, "renormalize": renormalize, "activation": "silu"}
    out = mix_experts(x, logits, w13, w2, **options)
    weights, chosen = logits.softmax(-1).topk(2)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    for token in range(3):
        expected = 0
        for weight, expert in zip(weights[token], chosen[token], strict=True):
            gate, values = (w13[expert] @ x[token]).chunk(2)
            hidden = torch.nn.functional.silu(gate) * values
            expected += weight * (w2[expert] @ hidden)
        torch.testing.assert_close(out[token], expected, rtol=1e-4, atol=1e-4)


def test_another_activation_of_experts_is_refused():
    x, weights = torch.zeros(1, 8), (torch.zeros(2, 12, 8), torch.zeros(2, 8, 6))
    options = {"top_k": 1, "renormalize": True, "activation": "gelu"}
    with pytest.raises(NotImplementedError, match="got 'gelu'"):
        mix_experts(x, torch.zeros(1, 2), *weights, **options)


def layer_config(**changes):
    return types.SimpleNamespace(
        **{
            "head_size": 128,
            "use_mla": False,
            "use_sparse": False,
            "use_mm_prefix": False,
            "attn_type": "decoder",
            **changes,
        }
    )


def test_layers_that_the_operator_computes_are_taken():
    refusals.check_layer(layer_config())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_mla": True}, "latent attention"),
        ({"use_sparse": True}, "sparse attention"),
        ({"use_mm_prefix": True}, "images that see each other"),
        ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
        ({"head_size": 1024}, "1024"),
    ],
)
def test_layers_that_it_does_not_are_refused_by_name(change, named):
    with pytest.raises(NotImplementedError, match=named):
        refusals.check_layer(layer_config(**change))


def engine_config(**changes):
    values = {
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "tensor_parallel_size": 1,
        "calculate_kv_scales": False,
        "speculative_config": None,
        "kv_transfer_config": None,
        "lora_config": None,
        **changes,
    }
    part = types.SimpleNamespace(**values)
    return types.SimpleNamespace(parallel_config=part, cache_config=part, **values)


def test_a_plain_engine_is_taken(monkeypatch):
    monkeypatch.setattr(refusals, "uses_spmd", lambda: False)
    refusals.check_config(engine_config())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"data_parallel_size": 2}, "data_parallel_size"),
        ({"decode_context_parallel_size": 2}, "context parallelism"),
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
        ({"tensor_parallel_size": 2}, "VLLM_XLA_USE_SPMD=1"),
        ({"calculate_kv_scales": True}, "calculate_kv_scales"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "kv_transfer_config"),
        ({"lora_config": object()}, "LoRA"),
    ],
)
def test_options_of_the_engine_are_refused_by_name(monkeypatch, change, named):
    monkeypatch.setattr(refusals, "uses_spmd", lambda: False)
    with pytest.raises(NotImplementedError, match=named):
        refusals.check_config(engine_config(**change))


def test_requests_that_the_sampler_would_not_follow_are_refused():
    neutral = {"presence_penalty": 0.0, "min_tokens": 0, "logit_bias": None}
    refusals.check_request(types.SimpleNamespace(**neutral, bad_words=[]))
    with pytest.raises(ValueError, match="presence_penalty, min_tokens must be left"):
        refusals.check_request(
            types.SimpleNamespace(**neutral | {"presence_penalty": 1, "min_tokens": 2})
        )


@pytest.mark.parametrize(
    ("versions", "modules", "expected"),
    [
        ({}, {"torch_xla", "tpu_info"}, "is for vLLM 0.13, found none"),
        ({"vllm": "0.12.0"}, {"torch_xla", "tpu_info"}, "found {'vllm': '0.12.0'}"),
        ({"vllm-tpu": "0.13.3"}, {"tpu_info"}, "torch_xla is not installed"),
        ({"vllm-tpu": "0.13.3"}, {"torch_xla"}, "tpu_info is not installed"),
        (
            {"vllm-tpu": "0.13.3"},
            {"torch_xla", "tpu_info", "tpu_inference"},
            "uninstall it",
        ),
        ({"vllm-tpu": "0.13.3"}, {"torch_xla", "tpu_info"}, None),
        ({"vllm": "0.13.0+tpu"}, {"torch_xla", "tpu_info"}, None),
    ],
)
def test_where_the_platform_is_used(monkeypatch, versions, modules, expected):
    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    def find_spec(name):
        return object() if name in modules else None

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    reason = vllm.reason_against()
    if expected is None:
        assert reason is None
        assert vllm.register() == "torch_rpa.vllm.platform.RpaPlatform"
    else:
        assert reason is not None and expected in reason
        assert vllm.register() is None


def test_the_entry_point_leads_to_register():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    group = "vllm.platform_plugins"
    ((name, value),) = project["entry-points"][group].items()
    assert importlib.metadata.EntryPoint(name, value, group).load() is vllm.register


def test_the_named_classes_exist():
    # In the text: their modules import vLLM.
    assert "class RpaPlatform(" in (FOLDER / "platform.py").read_text("utf-8")
    text = (FOLDER / "platform.py").read_text("utf-8")
    for name in ("attention.RpaBackend", "worker.RpaWorker"):
        module, cls = name.split(".")
        assert f'"torch_rpa.vllm.{name}"' in text
        assert f"class {cls}(" in (FOLDER / f"{module}.py").read_text("utf-8")

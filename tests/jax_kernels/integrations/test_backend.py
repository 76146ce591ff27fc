"""The engine's interface over the kernel, with a stand-in of the engine."""

import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_kernels.integrations import tpu_inference as integration
from tests.jax_kernels.integrations import stand_in


@pytest.fixture
def engine(monkeypatch):
    return stand_in.install(monkeypatch)


def make_backend() -> Any:
    from jax_kernels.integrations.tpu_inference import backend

    return backend.TorchRpaAttention()


def test_the_backend_is_registered_by_its_name(engine):
    integration.register()
    integration.register()  # vLLM may do so
    assert [name for name, _ in engine.registered] == ["torch_rpa", "torch_rpa"]
    made = engine.registered[0][1]["attention"]()
    assert isinstance(made, engine.backends.AttentionBackend)
    assert engine.backends.RPAAttentionBackend().get_kv_cache_shape(
        9, 16, 4, 128, jnp.bfloat16
    ) == (9, 16, 4, 2, 128)


def test_the_named_class_of_vllm_exists(engine):
    integration.register()
    module, _, name = engine.registered[0][1]["vllm_backend"].rpartition(".")
    assert f"class {name}(" in text_of(module)


def text_of(module):
    """The text of a module that cannot be imported here."""
    folder, _, name = module.rpartition(".")
    (path,) = sys.modules[folder].__path__
    with open(f"{path}/{name}.py", encoding="utf-8") as file:
        return file.read()


def test_an_engine_without_a_registry_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "tpu_inference", None)
    integration.register()


def test_another_kernel_of_the_engine_is_refused(engine):
    engine.envs.USE_BATCHED_RPA_KERNEL = True
    with pytest.raises(ValueError, match="USE_BATCHED_RPA_KERNEL must be unset"):
        make_backend()


def test_pages_are_only_cut_where_they_are_axis_1(engine):
    engine.envs.PREFILL_SLICES = "2"
    backend = make_backend()
    shape = backend.get_kv_cache_shape(9, 16, 2, 64, jnp.bfloat16)
    assert shape[:2] == (9, 16)
    with pytest.raises(NotImplementedError, match="got 1 key heads of a shard"):
        backend.get_kv_cache_shape(9, 16, 1, 64, jnp.bfloat16)


def test_a_step_of_the_engine_is_a_call(engine, monkeypatch):
    from jax_kernels.integrations.tpu_inference import sharded

    calls = []

    def attend(*arrays, **options):
        calls.append((arrays, options))
        return "out", "cache"

    monkeypatch.setattr(sharded, "attend", attend)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    options = {
        "head_dim_original": 80,
        "sm_scale": 0.1,
        "attention_chunk_size": 7,
        "q_scale": None,
        "k_scale": 0.5,
        "v_scale": 0.25,
        "sinks": "sinks",
        "update_kv_cache": True,
        "use_causal_mask": False,
        "attn_logits_soft_cap": 3.0,
        "decode_query_size": 4,
    }
    layer = types.SimpleNamespace(block_tables="pages")
    shared = types.SimpleNamespace(
        seq_lens="lens", query_start_loc="starts", request_distribution="distribution"
    )
    results = make_backend().attention(
        "cache", "q", "k", "v", layer, shared, mesh, **options
    )
    assert results == ("cache", "out")
    ((arrays, given),) = calls
    step = ("lens", "pages", "starts", "distribution")
    assert arrays == ("q", "k", "v", "cache", step, "sinks")
    assert isinstance(arrays[4], sharded.Step)
    assert given == {
        "mesh": mesh,
        "axes": sharded.Axes("data", "model"),
        "sm_scale": 0.1,
        "causal": False,
        "sliding_window": 7,
        "soft_cap": 3.0,
        "q_scale": None,
        "k_scale": 0.5,
        "v_scale": 0.25,
        "update_kv_cache": True,
        "decode_query_size": 4,
    }


def test_models_that_ask_for_no_backend_get_this_one(engine):
    from jax_kernels.integrations.tpu_inference import other_kernels

    made = types.SimpleNamespace(
        attention=lambda *args, **options: ("this", args, options),
        get_kv_cache_shape=lambda *sizes: ("this", *sizes),
    )
    other_kernels.replace_by(made)
    other_kernels.replace_by(None)  # once in a process
    default = engine.backends.RPAAttentionBackend()
    assert default.get_kv_cache_shape(1, 2) == ("this", 1, 2)
    assert default.attention(1, b=2) == ("this", (1,), {"b": 2})


def test_models_that_call_a_kernel_themselves_are_refused(engine):
    from jax_kernels.integrations.tpu_inference import other_kernels

    assert engine.model.attend() == "own"
    other_kernels.replace_by(engine.backends.RPAAttentionBackend())
    own = engine.kernels
    for kernel in (
        engine.model.attend,  # imported before
        own[f"{stand_in.KERNELS}.kernel"].ragged_paged_attention,
        own[f"{stand_in.KERNELS}.kernel_hd64"].ragged_paged_attention_hd64,
    ):
        with pytest.raises(NotImplementedError, match="set MODEL_IMPL_TYPE=vllm"):
            kernel()

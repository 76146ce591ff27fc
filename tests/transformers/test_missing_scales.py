"""A cache in int8 without scales warns once, wherever a model is run with it."""

import warnings
from typing import Any

import pytest
import torch

import torch_rpa
from tests.support.tiny_llama import build_llama
from tests.transformers.routes import build, custom_generate, generate_in_block, padded
from torch_rpa.serving import Engine, EngineOptions
from torch_rpa.transformers import RaggedBatch, RPAContext, empty_kv_caches
from torch_rpa.transformers import missing_scales as module

WARNING = r"int8 rounds keys and values to whole numbers without k_scale and v_scale"


@pytest.fixture(autouse=True)
def a_new_process():
    """Whatever has warned before."""
    for warn in (module._warn, module._warn_of_unused):
        warn.cache_clear()
    yield
    for warn in (module._warn, module._warn_of_unused):
        warn.cache_clear()


def run_engine(model: Any, cache_dtype: torch.dtype, **scales: Any) -> None:
    Engine(model, EngineOptions(device="cpu", cache_dtype=cache_dtype, **scales))


def run_generate(model: Any, cache_dtype: torch.dtype, **scales: Any) -> None:
    options = {"max_new_tokens": 1, "cache_dtype": cache_dtype, **scales}
    custom_generate(model, padded(), **options)


def run_in_block(model: Any, cache_dtype: torch.dtype, **scales: Any) -> None:
    options = {"max_new_tokens": 1, "cache_dtype": cache_dtype, **scales}
    generate_in_block(model, padded(), **options)


@torch.no_grad()
def call_model(model: Any, cache_dtype: torch.dtype, **scales: Any) -> None:
    caches = empty_kv_caches(model, 1, 8, dtype=cache_dtype, device="cpu")
    batch = RaggedBatch(*(torch.tensor(x).int() for x in ([2], [0], [0, 2], [0, 0, 1])))
    ids, positions = torch.tensor([[5, 6], [0, 1]])[:, None]
    context = RPAContext(caches, batch, **scales)
    model(input_ids=ids, position_ids=positions, use_cache=False, rpa=context)


RUNS = [run_engine, run_generate, run_in_block, call_model]


@pytest.mark.parametrize("run", RUNS)
def test_int8_without_scales_warns_once_and_says_how_to_get_them(run):
    model = build("rpa")
    with pytest.warns(UserWarning, match=WARNING) as warned:
        run(model, torch.int8)
        run(model, torch.int8)
    (message,) = [str(warning.message) for warning in warned]
    assert "torch_rpa.measure_kv_scales(model, prompts, dtype=torch.int8)" in message


@pytest.mark.parametrize("run", RUNS)
def test_scales_and_other_dtypes_do_not_warn(run):
    model = build("rpa")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, torch.int8, k_scale=0.1, v_scale=1.0)
        run(model, torch.float8_e4m3fn)
        run(model, torch.float32)


def test_the_missing_one_of_two_is_named():
    model = build_llama("rpa")
    with pytest.warns(UserWarning, match="rounds values .* without v_scale, which"):
        run_engine(model, torch.int8, k_scale=0.1)
    with pytest.warns(UserWarning, match="rounds keys .* without k_scale, which"):
        run_engine(model, torch.int8, v_scale=0.1)


def test_scales_of_a_checkpoint_that_are_not_used_warn_once():
    model = build("rpa")
    for layer in model.model.layers:
        for name in ("k_scale", "v_scale"):
            layer.self_attn.register_buffer(name, torch.tensor(0.5))
    run_engine(model, torch.float8_e4m3fn, **torch_rpa.read_kv_scales(model)._asdict())
    run_engine(model, torch.float8_e4m3fn, k_scale=1.0, v_scale=1.0)
    run_engine(model, torch.float32)
    with pytest.warns(
        UserWarning, match=r"torch_rpa\.read_kv_scales\(model\)"
    ) as warned:
        run_engine(model, torch.float8_e4m3fn)
        run_generate(model, torch.float8_e4m3fn)
    assert len(warned) == 1

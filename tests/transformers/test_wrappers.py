"""Models around a model: adapters, here with the interface of PEFT, and compiled ones.

``get_base_model``, ``active_peft_config`` and how ``generate`` lends its method to the
model inside are those of PEFT 0.21. Its own models are tested where it is installed.
"""

import contextlib
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.transformers.routes import (
    NEW_TOKENS,
    build,
    custom_generate,
    eager_generate,
    generate_in_block,
    padded,
)
from torch_rpa.serving import Engine, EngineOptions, SamplingParams
from torch_rpa.transformers import empty_kv_caches, paged_generation, use_rpa
from torch_rpa.transformers.wrappers import innermost

ROUTES = [custom_generate, generate_in_block]
# What makes an adapter act on whole texts.
OF_TEXTS = [
    {"peft_type": "PROMPT_TUNING", "is_prompt_learning": True},
    {"peft_type": "ADAPTION_PROMPT", "is_adaption_prompt": True},
    {"peft_type": "LORA", "alora_invocation_tokens": [5, 6]},
]


class PeftModel(torch.nn.Module):
    """A model with adapters around a model, as PEFT makes it."""

    def __init__(self, model, **config):
        super().__init__()
        self.base_model = model
        self.config_of_adapter = SimpleNamespace(**{"peft_type": "LORA", **config})
        self.prepares = model.prepare_inputs_for_generation
        self._adapters_disabled: Any = False

    @property
    def active_peft_config(self):
        return self.config_of_adapter

    def get_base_model(self):
        return self.base_model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return self.prepares(*args, **kwargs)

    def generate(self, *args, **kwargs):
        former = self.base_model.prepare_inputs_for_generation
        method = self.prepare_inputs_for_generation
        self.base_model.prepare_inputs_for_generation = method
        try:
            return self.base_model.generate(*args, **kwargs)
        finally:
            self.base_model.prepare_inputs_for_generation = former


@pytest.fixture(scope="module")
def expected():
    return eager_generate(build("eager"), padded())


@pytest.mark.parametrize("route", ROUTES)
def test_adapters_of_layers_run_like_the_model_inside(route, expected):
    model: Any = PeftModel(use_rpa(build("rpa")))
    assert torch.equal(route(model, padded()), expected)


@pytest.mark.parametrize("config", OF_TEXTS, ids=lambda config: config["peft_type"])
def test_adapters_of_whole_texts_are_refused_everywhere(config):
    model: Any = PeftModel(build("rpa"), **config)
    refused = pytest.raises(NotImplementedError, match=config["peft_type"])
    for route in ROUTES:
        with refused:
            route(model, padded())
    with paged_generation(model.base_model), refused:
        eager_generate(model, padded())
    for function in (use_rpa, Engine):
        with refused:
            function(model)
    with refused:
        empty_kv_caches(model, 2, 8, dtype=torch.float32, device="cpu")
    model._adapters_disabled = True
    use_rpa(model)


class AdaptedLayer(torch.nn.Module):
    """A layer with an adapter, as PEFT makes it."""

    active_adapters = ("default",)
    is_off = False

    @property
    def disable_adapters(self):
        return self.is_off


def test_adapters_of_whole_texts_inside_of_layers_are_refused():
    """The model of PEFT around it does not show in the model that generates."""
    model: Any = build("rpa")
    layer = model.adapted_layer = AdaptedLayer()
    model.peft_config = {"default": SimpleNamespace(peft_type="LORA")}
    use_rpa(model)
    model.peft_config["default"].alora_invocation_tokens = [5, 6]
    refused = pytest.raises(NotImplementedError, match="got LORA, which acts on whole")
    for route in ROUTES:
        with refused:
            route(model, padded())
    for function in (use_rpa, Engine):
        with refused:
            function(model)
    layer.is_off = True
    engine = Engine(model)  # whose adapters are switched later
    for layer.is_off in (True, False, True):
        (output,) = engine.generate_batch([[5, 6, 7]]).values()
        assert (output.error is None) == layer.is_off
        assert layer.is_off or "got LORA, which acts on whole" in str(output.error)


def test_the_innermost_model_is_found():
    model = build("rpa")
    assert innermost(model) is model
    assert innermost(PeftModel(model)) is model
    assert innermost(torch.compile(PeftModel(model), backend="eager")) is model


@pytest.mark.parametrize(
    "whole_model", [False, pytest.param(True, marks=pytest.mark.extended)]
)
def test_a_compiled_model_runs_in_a_block(whole_model, expected):
    model: Any = build("rpa")
    if whole_model:
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")  # of dynamo, about itself
        got = generate_in_block(model, padded(), max_new_tokens=3)
    assert torch.equal(got, expected[:, :24])


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


# Of transformers 5.24, at what PEFT 0.21 asks of a model.
OF_PEFT = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


def model_of_peft(peft, attention, **config):
    """A model with low-rank adapters that change its tokens."""
    wishes = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = peft.get_peft_model(
            build(attention), peft.LoraConfig(**{**wishes, **config})
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@OF_PEFT
@pytest.mark.parametrize("config", [{}, {"use_dora": True}])
@pytest.mark.parametrize("route", ROUTES)
def test_models_of_peft_give_the_tokens_of_eager(route, config, peft, expected):
    model = model_of_peft(peft, "eager", **config)
    adapted = eager_generate(model, padded())
    assert not torch.equal(adapted, expected)
    model = model_of_peft(peft, "rpa", **config)
    assert torch.equal(route(model, padded()), adapted)


@OF_PEFT
@pytest.mark.parametrize("route", ROUTES)
def test_prompt_tuning_of_peft_is_refused(route, peft):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(build("rpa"), config).eval()
    with pytest.raises(NotImplementedError, match="PROMPT_TUNING"):
        route(model, padded())


@OF_PEFT
def test_an_engine_notices_that_adapters_of_peft_are_switched(peft):
    eager, model = (model_of_peft(peft, name) for name in ("eager", "rpa"))
    engine = Engine(model, EngineOptions(page_size=8))
    prompt = torch.arange(2, 22)[None]
    shared = []
    for is_off in (False, True, False):
        with eager.disable_adapter() if is_off else contextlib.nullcontext():
            expected = eager_generate(eager, {"input_ids": prompt})
        with model.disable_adapter() if is_off else contextlib.nullcontext():
            (output,) = engine.generate_batch(
                prompt, SamplingParams(max_new_tokens=NEW_TOKENS)
            ).values()
        assert output.generated_tokens == expected[0, 20:].tolist()
        shared.append(output.num_shared_tokens)
    assert shared == [0, 0, 16]

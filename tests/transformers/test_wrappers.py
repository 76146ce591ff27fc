"""Models around a model: adapters, here with the interface of PEFT, and compiled ones.

``get_base_model``, ``active_peft_config`` and how ``generate`` lends its method to the
model inside are those of PEFT 0.21. Its own models are tested where it is installed.
"""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.transformers.routes import (
    build,
    custom_generate,
    eager_generate,
    generate_in_block,
    padded,
)
from torch_rpa.serving import Engine
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


@pytest.mark.parametrize("route", ROUTES)
def test_models_of_peft_give_the_tokens_of_eager(route):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tokens = []
    for attention in ("eager", "rpa"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            model = peft.get_peft_model(build(attention), config).eval()
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
        tokens.append(
            (route if attention == "rpa" else eager_generate)(model, padded())
        )
    assert torch.equal(*tokens)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(build("rpa"), config).eval()
    with pytest.raises(NotImplementedError, match="PROMPT_TUNING"):
        route(model, padded())

"""What torch_xla compiles, runs and reads; and that caches stay in their buffers."""

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

torch_xla = pytest.importorskip("torch_xla")

import torch_xla.core.xla_model as xm  # noqa: E402
import torch_xla.debug.metrics as metrics  # noqa: E402

from tests.transformers.routes import (  # noqa: E402
    build,
    custom_generate,
    generate_in_block,
    padded,
)
from torch_rpa.bridges import torch_xla as xla_bridge  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:You are calling .generate.* on a device type different:UserWarning"
)

NUM_LAYERS, NUM_DECODES = 2, 20
COUNTED = ("CompileTime", "ExecuteTime", "TransferFromDeviceTime")
ROUTES = (custom_generate, generate_in_block)
# Scenario: most tokens in a step; programs compiled by the first call, and steps. The
# 39 tokens of the prompts make 3 chunks; then the caches are made by a third program.
SCENARIOS = {"whole prefill": (None, 2, 1), "chunked prefill": (16, 3, 3)}


def counts() -> list[int]:
    found = [metrics.metric_data(name) for name in COUNTED]
    return [data[0] if data else 0 for data in found]


def on_xla(vocabulary: int):
    """A model whose programs no other test compiles, if its vocabulary is its own."""
    model = build("rpa")
    model.resize_token_embeddings(vocabulary)
    model = model.to(torch_xla.device())
    model.tie_weights()
    torch_xla.sync()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_programs_steps_and_transfers(route, scenario):
    budget, num_programs, num_prefills = SCENARIOS[scenario]
    case = 2 * ROUTES.index(route) + list(SCENARIOS).index(scenario)
    model = on_xla(65 + case)
    metrics.clear_all()
    before = [0, 0, 0]
    for programs in (num_programs, 0):
        route(
            model,
            padded(),
            max_new_tokens=NUM_DECODES + 1,
            max_tokens_per_step=budget,
            num_pages=23 + case,  # so that the caches are its own as well
        )
        after = counts()
        steps = num_prefills + NUM_DECODES
        fills = budget is not None  # a program that makes the caches
        compiled, executed, read = (
            now - then for now, then in zip(after, before, strict=True)
        )
        assert compiled == programs
        assert executed == steps + fills
        assert read == steps  # the logits and nothing else
        before = after
    assert [name for name in metrics.counter_names() if name.startswith("aten::")] == []
    # The decode program takes over the buffer of every cache.
    aliased = [count for _, count in metrics.metric_data("InputOutputAliasCount")[2]]
    assert max(aliased) == NUM_LAYERS


@pytest.mark.slow
def test_one_program_serves_scales_of_all_layers(monkeypatch):
    lowered = []
    lower = xla_bridge._lower

    def counting_lower(*arguments):
        lowered.append(None)  # tensors that are kept would be results
        return lower(*arguments)

    monkeypatch.setattr(xla_bridge, "_lower", counting_lower)
    model = on_xla(70)
    k_scale = torch.tensor([[0.25, 0.125], [0.0625, 0.5]])
    texts = []
    before = counts()[0]
    for factor, num_programs in (1, 2), (16, 0):  # prefill and decode, then neither
        texts.append(
            custom_generate(
                model,
                padded(),
                num_pages=29,  # so that the signatures are its own
                cache_dtype=torch.int8,
                k_scale=factor * k_scale,
                v_scale=[factor / 16, factor / 32],
            )
        )
        compiled = counts()[0]
        assert compiled - before == num_programs
        before = compiled
    assert len(lowered) == 2  # not for each layer
    assert not torch.equal(*texts)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_caches_stay_in_their_buffers(route):
    model = on_xla(64)
    caches, pointers = [], []

    def keep_caches(module, args, kwargs, output):
        if kwargs.get("rpa") is not None:
            caches[:] = kwargs["rpa"].kv_caches

    class RecordsPointers(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            xm.wait_device_ops()
            pointers.append([torch_xla._XLAC._unsafe_buffer_pointer(c) for c in caches])
            return torch.zeros(len(input_ids), dtype=torch.bool)

    handle = model.model.register_forward_hook(keep_caches, with_kwargs=True)
    route(model, padded(), stopping_criteria=StoppingCriteriaList([RecordsPointers()]))
    handle.remove()
    assert len(pointers) > 2 and len(set(pointers[0])) == NUM_LAYERS
    assert all(step == pointers[0] for step in pointers)

"""Parity with eager attention, for every family in the table of the docs."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tests.transformers import families
from tests.transformers.families import PROVEN, REFUSED
from torch_rpa.serving import Engine, EngineOptions, SamplingParams
from torch_rpa.transformers import (
    RaggedBatch,
    RPAContext,
    empty_kv_caches,
    generate,
    use_rpa,
)

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
NUM_DECODES = 20
# A prefill, a second chunk of it, and decode steps; windows of 6 and pages of 8 end
# inside.
STEPS = [9, 6] + [1] * NUM_DECODES
PAGES = [3, 0, 4, 1, 2]


def build(family):
    """A small model with random weights and eager attention."""
    config = AutoConfig.for_model(family.name, **{**families.SMALL, **family.config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(parameter)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval()


@pytest.fixture(
    params=[
        pytest.param(
            family,
            id=family.name,
            marks=[pytest.mark.extended] if family.is_extended else [],
        )
        for family in PROVEN
    ]
)
def model(request):
    if request.param.needs > VERSION:
        pytest.skip(f"needs transformers {request.param.needs}")
    return build(request.param)


def random_tokens(*shape):
    return torch.randint(2, 64, shape, generator=torch.Generator().manual_seed(4))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def paged_logits(model, tokens: torch.Tensor) -> torch.Tensor:
    """Computes one sequence in the chunks of STEPS; returns ``[1, L, vocabulary]``."""
    caches = empty_kv_caches(
        use_rpa(model), len(PAGES), 8, dtype=model.dtype, device="cpu"
    )
    logits, start = [], 0
    for size in STEPS:
        batch = RaggedBatch(
            int32(start + size), int32(*PAGES), int32(0, size), int32(0, 0, 1)
        )
        out = model(
            input_ids=tokens[:, start : start + size],
            position_ids=torch.arange(start, start + size)[None],
            use_cache=False,
            rpa=RPAContext(caches, batch),
        )
        logits.append(out.logits)
        start += size
    return torch.cat(logits, dim=1)


@torch.no_grad()
def test_logits_are_as_exact_as_those_of_eager_attention(model):
    tokens = random_tokens(1, sum(STEPS))
    exact_model = copy.deepcopy(model).double()
    if VERSION >= (5, 0):  # the fused products of experts know no float64
        exact_model.set_experts_implementation("eager")
    exact = exact_model(tokens, use_cache=False).logits
    for dtype in (torch.float32, torch.bfloat16):
        rounded = copy.deepcopy(model).to(dtype)
        errors = [
            (logits.double() - exact).square().mean().sqrt()
            for logits in (
                paged_logits(copy.deepcopy(rounded), tokens),
                rounded(tokens, use_cache=False).logits,
            )
        ]
        # What rounding to this type costs the model itself, and half as much again
        # since the two round in different places.
        assert errors[0] <= 1.5 * errors[1], (dtype, errors)


@pytest.mark.slow
def test_a_ragged_batch_generates_the_tokens_of_eager_attention(model):
    ids, mask = random_tokens(3, 15), torch.ones(3, 15, dtype=torch.long)
    mask[0, :9] = mask[1, :3] = 0
    inputs: dict[str, Any] = {"input_ids": ids * mask, "attention_mask": mask}
    inputs.update(max_new_tokens=NUM_DECODES + 1, do_sample=False)
    expected = model.generate(**inputs)
    got = use_rpa(model).generate(
        **inputs, custom_generate=generate, max_tokens_per_step=11
    )
    assert torch.equal(got, expected)


@pytest.mark.slow
def test_an_engine_generates_the_tokens_of_eager_attention(model):
    """With a shared beginning, chunks, preemptions, and windows that end inside."""
    eager = copy.deepcopy(model)
    options = EngineOptions(
        max_num_sequences=3,
        max_tokens_per_step=12,
        max_sequence_length=40,
        page_size=8,
        num_pages=5,  # one sequence of full length, or two with a window
    )
    engine = Engine(model, options)
    (shared,) = random_tokens(1, 17).tolist()
    prompts = [shared, [*shared, 5], [7, 8, 9], [*shared[:9], 4, 4]]
    results = engine.generate_batch(prompts, SamplingParams(max_new_tokens=14))
    assert engine.stats.num_preemptions and engine.stats.num_shared_tokens
    for output in results.values():
        tokens = torch.tensor([output.prompt_ids + output.generated_tokens])
        with torch.no_grad():
            best = eager(tokens, use_cache=False).logits[0].argmax(dim=-1)
        assert output.generated_tokens == best[len(output.prompt_ids) - 1 : -1].tolist()


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_a_refused_family_raises(family):
    model = build(family)
    with pytest.raises((NotImplementedError, ValueError), match=family.message):
        use_rpa(model).generate(
            random_tokens(1, 9), custom_generate=generate, max_new_tokens=2
        )


def test_the_table_of_families_is_up_to_date():
    document = families.DOCUMENT.read_text(encoding="utf-8")
    assert document == families.with_table(document), (
        "run python -m tests.transformers.families"
    )

"""Rotary factors that depend on the length give what transformers gives."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tests.transformers.families import SMALL
from tests.transformers.routes import (
    CACHE,
    PAD,
    custom_generate,
    eager_generate,
    generate_in_block,
)
from torch_rpa.transformers import paged_generation, use_rpa
from torch_rpa.transformers.rotary import LengthScaling, length_scaling

LIMIT = 24
LONGROPE = {
    "original_max_position_embeddings": LIMIT,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 16,
        "long_factor": [1.0 + 3 * i for i in range(16)],
    },
}
# Whose method of its own starts again where the factors change, and two that go on.
CONFIGS = {
    "phi3": {"hidden_size": 128, **LONGROPE},
    "llama": LONGROPE,
    "qwen2": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
        "max_position_embeddings": LIMIT,
    },
}
LENGTHS = (5, 20, 40)  # below the limit, across it while decoding, beyond it


def build(family):
    # transformers 4.57 writes into what it is given.
    own = copy.deepcopy(CONFIGS[family])
    config = AutoConfig.for_model(family, **{**SMALL, "sliding_window": None, **own})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.generation_config = GenerationConfig(pad_token_id=PAD)
    return model.eval()


def padded(lengths):
    generator = torch.Generator().manual_seed(4)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(1, 60, (length,), generator=generator)
        mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(params=[custom_generate, generate_in_block], ids=lambda f: f.__name__)
def paged_generate(request):
    return request.param


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("phi3", LengthScaling(LIMIT, has_one_switch=True, starts_again=True)),
        ("llama", LengthScaling(LIMIT, has_one_switch=True, starts_again=False)),
        ("qwen2", LengthScaling(LIMIT, has_one_switch=False, starts_again=False)),
    ],
)
def test_a_model_says_how_its_factors_depend_on_the_length(family, expected):
    model = build(family)
    assert length_scaling(model) == expected
    # The case is a case: the factors do change the logits.
    tokens = padded([40])["input_ids"]
    with torch.no_grad():
        whole, beginning = (
            model(t, use_cache=False).logits for t in (tokens, tokens[:, :20])
        )
    assert (whole[:, :20] - beginning).abs().max() > 0.1


@pytest.mark.parametrize("max_tokens_per_step", [None, 16])
@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_each_row_switches_as_it_does_alone(
    family, max_tokens_per_step, paged_generate
):
    model = build(family)
    inputs, alone = padded(LENGTHS), []
    # To compute the cache again is to have none; transformers 4.57 fails to do so.
    cached = {"use_cache": family != "phi3"}
    for ids, length in zip(inputs["input_ids"], LENGTHS, strict=True):
        one = {"input_ids": ids[None, -length:]}
        alone.append(eager_generate(model, one, **cached)[0, -12:])
    options = {"max_tokens_per_step": max_tokens_per_step}
    got = paged_generate(use_rpa(model), inputs, **options)
    assert torch.equal(got[:, -12:], torch.stack(alone))


@pytest.mark.parametrize("max_tokens_per_step", [None, 7])
def test_the_longest_row_sets_the_factors_of_a_batch_as_in_eager(
    max_tokens_per_step, paged_generate
):
    model, inputs = build("qwen2"), padded((5, 20, 22))
    paged = use_rpa(copy.deepcopy(model))
    # The longest row ends first, and goes on with padding.
    eos = int(eager_generate(copy.deepcopy(model), inputs)[2, 24])
    expected = eager_generate(model, inputs, eos_token_id=eos)
    assert (expected[2, 25:] == PAD).all() and expected.shape[1] > LIMIT + 6
    got = paged_generate(
        paged, inputs, eos_token_id=eos, max_tokens_per_step=max_tokens_per_step
    )
    assert torch.equal(got, expected)


def two_turns(model, first, second, **keywords):
    out = eager_generate(
        model, first, max_new_tokens=4, return_dict_in_generate=True, **keywords
    )
    ids = torch.cat([out.sequences, second], dim=1)
    new = torch.ones(len(ids), ids.shape[1] - first["input_ids"].shape[1]).long()
    mask = torch.cat([first["attention_mask"], new], dim=1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    cached = {CACHE: out[CACHE]} if CACHE in out else keywords
    return eager_generate(model, inputs, max_new_tokens=4, **cached)


@pytest.mark.parametrize("num_tokens", [5, 18, 30])
def test_a_second_turn_may_cross_the_switch(num_tokens):
    model = build("phi3")
    first, second = padded([num_tokens]), torch.tensor([[7, 8, 9]])
    expected = two_turns(model, first, second, use_cache=False)
    with paged_generation(use_rpa(model), page_size=8, max_length=60):
        assert torch.equal(two_turns(model, first, second), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_second_turn_that_would_have_to_keep_old_factors_is_refused(family):
    model, second = build(family), torch.tensor([[7, 8, 9]])
    expected = two_turns(copy.deepcopy(model), padded([5]), second)
    with paged_generation(use_rpa(model), page_size=8, max_length=60):
        assert torch.equal(two_turns(model, padded([5]), second), expected)
        with pytest.raises(NotImplementedError, match=f"up to {LIMIT} tokens, got 25"):
            two_turns(model, padded([18]), second)

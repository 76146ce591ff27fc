"""Arguments of a model: those that change nothing pass, the others are named."""

from types import SimpleNamespace

import pytest
import torch

from torch_rpa.transformers.model_arguments import refuse_unknown_arguments


def model_of(model_type):
    return SimpleNamespace(config=SimpleNamespace(model_type=model_type))


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_mask": torch.ones(2, 3), "use_cache": True, "pixel_values": None},
        {"mm_encoder_outputs": {}},
        {"mm_encoder_outputs": {"image": None, "video": {}}, "images": [[], None]},
        {"tokenizer": object(), "assistant_tokenizer": object()},
        {"token_type_ids": torch.zeros(2, 3), "mm_token_type_ids": torch.zeros(2, 3)},
        {"is_causal": True, "output_attentions": False, "output_router_logits": False},
    ],
)
def test_what_cannot_change_the_answer_passes(arguments):
    refuse_unknown_arguments(model_of("gemma3"), arguments)


@pytest.mark.parametrize(
    ("model_type", "arguments"),
    [
        ("gemma3", {"mm_encoder_outputs": {"image": torch.ones(1)}}),
        ("gemma3", {"pixel_values": torch.zeros(1)}),
        ("gemma3", {"token_type_ids": torch.tensor([0, 1])}),
        ("paligemma", {"token_type_ids": torch.tensor([0, 1])}),
        ("gemma3", {"is_causal": False}),
        ("gemma3", {"output_router_logits": True}),
        ("gemma3", {"labels": 0}),
    ],
)
def test_what_could_change_it_is_named(model_type, arguments):
    (name,) = arguments
    with pytest.raises(NotImplementedError, match=rf"model arguments \['{name}'\]"):
        refuse_unknown_arguments(model_of(model_type), arguments)

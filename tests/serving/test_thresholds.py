"""The tokens that are kept are those that a sorted vocabulary gives."""

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from torch_rpa.serving import thresholds

# Rows of all parameters together: top-k (0 is all), top-p (2 is all), min-p.
LIMITS = [
    (0, 2.0, 0.0),
    (1, 2.0, 0.0),
    (7, 2.0, 0.0),
    (0, 0.9, 0.0),
    (0, 1e-9, 0.0),
    (20, 0.5, 0.0),
    (0, 2.0, 0.2),
    (0, 2.0, 1.0),
    (40, 0.9, 0.05),
]


def kept(logits, limits, temperature=1.0):
    top_k, top_p, min_p = (torch.tensor(values) for values in zip(*limits, strict=True))
    top_k = torch.where(top_k == 0, logits.shape[-1], top_k).int()
    scaled = logits.float() / temperature
    return thresholds.kept(logits, scaled, top_k, top_p, min_p)


@pytest.fixture(params=["looking", "searching"])
def way(request, monkeypatch):
    """Both ways to find the tokens, on the CPU."""
    if request.param == "searching":
        monkeypatch.setattr(thresholds, "_can_look", lambda tensor: False)


def sorted_reference(logits, top_k, top_p, min_p):
    """Goes through one row from the most likely token on, in float64."""
    probabilities = logits.double().softmax(0)
    order = logits.double().argsort(descending=True).tolist()
    count = min(top_k or len(order), len(order))
    last = logits[order[count - 1]]
    order = [token for token in order if logits[token] >= last]  # ties too
    total = float(probabilities[order].sum())
    mass, least = 0.0, None
    for token in order:
        if mass < top_p * total:
            least = logits[token]
        mass += float(probabilities[token])
    return (logits >= least) & (probabilities >= min_p * probabilities.max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [3, 50, 1000])
def test_kept_tokens_are_those_of_a_sorted_vocabulary(vocabulary, dtype, way):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(len(LIMITS), vocabulary, generator=generator) * 3
    logits[:, ::5] = logits[:, 1:2]  # as likely as each other
    logits[:, 2] = -torch.inf
    logits = logits.to(dtype)
    expected = [
        sorted_reference(row, *limits)
        for row, limits in zip(logits, LIMITS, strict=True)
    ]
    got = kept(logits, LIMITS)
    assert torch.equal(got, torch.stack(expected))
    assert got.any(dim=-1).all() and not got.all()


@pytest.mark.parametrize(
    "values",
    [
        [0.0, -0.0, -1.0],  # both zeros are as likely
        [2e-38, 0.0, -2e-38],
        [3e38, 1.0, -3e38],
        [-1.0, -1.0000001, -2.0],
        [5.0, 5.0, 5.0],
    ],
)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_tells_the_closest_numbers_apart(values, top_k, way):
    logits = torch.tensor([values])
    expected = logits >= logits.sort(descending=True).values[:, top_k - 1]
    assert torch.equal(kept(logits, [(top_k, 2.0, 0.0)]), expected)


def test_kept_tokens_are_those_of_the_warpers_of_transformers(way):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 100, generator=generator) * 2
    for top_k, top_p, min_p in ((30, 0.8, 0.0), (100, 0.95, 0.02), (50, 0.9, 0.1)):
        scores = logits
        for warper in (
            TopKLogitsWarper(top_k),
            TopPLogitsWarper(top_p),
            MinPLogitsWarper(min_p),
        ):
            scores = warper(torch.zeros(200, 1, dtype=torch.int64), scores)  # pyright: ignore[reportArgumentType]
        got = kept(logits, [(top_k, top_p, min_p)] * len(logits))
        assert torch.equal(got, scores > -torch.inf)

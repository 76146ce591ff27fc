"""Tokens are drawn as often as they should be, and again by the same seed."""

import pytest
import torch

from torch_rpa import devices
from torch_rpa.serving import SamplingParams
from torch_rpa.serving.finite import NO_TOKEN, marking
from torch_rpa.serving.sampling import build_sampling_inputs, greedy, sample

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def draw(logits, params, *, seeds=(0,), positions=(0,)):
    """Draws a token from the same logits for each pair of seed and position."""
    rows = [(params, seed, position) for seed in seeds for position in positions]
    inputs = build_sampling_inputs(rows, len(rows), len(logits))
    return sample(logits.expand(len(rows), -1), inputs)


def chi_square(counts, probabilities):
    """Returns the deviation of counts, in standard deviations of chi square."""
    expected = counts.sum() * probabilities
    kept = expected > 0
    assert not counts[~kept].any()
    deviation = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = int(kept.sum()) - 1
    return float(deviation - freedom) / (2 * freedom) ** 0.5


def reference(logits, temperature, top_k, top_p):
    """Probabilities by the definition, in float64, token by token."""
    probabilities = (logits.double() / temperature).softmax(0)
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    kept = order[: top_k or None]
    total, mass, nucleus = float(probabilities[kept].sum()), 0.0, []
    for token in kept:
        if mass < top_p:
            nucleus.append(token)
        mass += float(probabilities[token]) / total
    out = torch.zeros(len(logits), dtype=torch.float64)
    out[nucleus] = probabilities[nucleus] / probabilities[nucleus].sum()
    return out


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (2.0, 0, 1.0),
        (1.0, 3, 1.0),
        (1.0, 0, 0.8),
        (1.0, 4, 0.9),
        (1.5, 2, 0.99),
        (1.0, 9, 1.0),
    ],
)
@pytest.mark.parametrize("varies", ["seeds", "positions"])
def test_tokens_are_drawn_from_their_distribution(temperature, top_k, top_p, varies):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens = draw(LOGITS, params, **{varies: range(5000)})
    counts = torch.bincount(tokens, minlength=len(LOGITS)).double()
    expected = reference(LOGITS, temperature, top_k, top_p)
    assert (expected == 0).any() == (top_k in (2, 3, 4) or top_p < 1)
    assert chi_square(counts, expected) < 5


def test_the_tests_of_distributions_have_power():
    tokens = draw(LOGITS, SamplingParams(temperature=1.0), seeds=range(5000))
    counts = torch.bincount(tokens, minlength=len(LOGITS)).double()
    assert chi_square(counts, reference(LOGITS, 1.1, 0, 1.0)) > 5


@pytest.mark.parametrize("varies", ["seeds", "positions"])
def test_draws_next_to_each_other_are_independent(varies):
    uniform = torch.zeros(4)
    tokens = draw(uniform, SamplingParams(temperature=1.0), **{varies: range(8001)})
    pairs = torch.bincount(tokens[:-1] * 4 + tokens[1:], minlength=16).double()
    assert chi_square(pairs, torch.full((16,), 1 / 16)) < 5


def test_a_large_vocabulary_is_drawn_evenly():
    uniform = torch.zeros(50_000)
    tokens = draw(uniform, SamplingParams(temperature=1.0), seeds=range(150))
    assert len(set(tokens.tolist())) > 145  # 0.2 collisions expected
    counts = torch.bincount(tokens // 5000, minlength=10).double()
    assert chi_square(counts, torch.full((10,), 0.1)) < 5


def test_a_draw_depends_on_seed_and_position_alone():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 300, generator=generator)
    params = SamplingParams(temperature=1.0, top_k=100)
    rows = [(params, index, index) for index in range(6)]
    together = sample(logits, build_sampling_inputs(rows, 6, 300))
    for index in range(6):
        alone = sample(
            logits[index : index + 1].expand(3, -1),
            build_sampling_inputs(rows[index : index + 1], 3, 300),
        )
        assert alone[0] == together[index]
    others = [(params, seed + 1, position) for _, seed, position in rows]
    assert (sample(logits, build_sampling_inputs(others, 6, 300)) != together).any()


def test_greedy_rows_are_greedy_among_others():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 40, generator=generator)
    hot, cold = SamplingParams(temperature=5.0), SamplingParams()
    rows = [((hot, cold)[i % 2], i, i) for i in range(50)]
    tokens = sample(logits, build_sampling_inputs(rows, 50, 40))
    assert torch.equal(tokens[1::2], greedy(logits)[1::2])
    assert (tokens[::2] != greedy(logits)[::2]).sum() > 10


def test_tokens_as_likely_as_the_last_one_kept_are_kept():
    logits = torch.tensor([1.0, 1.0, 1.0, 0.0])
    params = SamplingParams(temperature=1.0, top_k=1)
    assert set(draw(logits, params, seeds=range(50)).tolist()) == {0, 1, 2}


def test_a_tiny_share_keeps_the_most_likely_token():
    params = SamplingParams(temperature=3.0, top_p=1e-9)
    assert set(draw(LOGITS, params, seeds=range(20)).tolist()) == {0}


def test_tokens_without_any_probability_are_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0])
    for params in (
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, top_k=3),
        SamplingParams(temperature=1.0, top_p=0.999),
    ):
        assert set(draw(logits, params, seeds=range(50)).tolist()) == {1, 3}


@pytest.mark.torch_xla
def test_the_xla_device_draws_the_same_tokens_with_one_program_for_all_parameters():
    import torch_xla

    from torch_rpa import devices

    generator = torch.Generator().manual_seed(0)
    device = torch_xla.device()
    choices = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 20, 1.0, 0.0)]
    choices += [(1.3, 50, 0.9, 0.0), (1.0, 0, 0.8, 0.01), (1.5, 300, 1.0, 0.2)]
    params = [
        SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
        for t, k, p, m in choices
    ]
    counts = []
    for few in (params, params[:2]):
        logits = torch.randn(64, 300, generator=generator)
        rows = [(few[i % len(few)], 2**60 + i, i) for i in range(60)]
        inputs = build_sampling_inputs(rows, 64, 300)
        on_xla = sample(logits.to(device), inputs.to(device)).cpu()
        assert torch.equal(on_xla, sample(logits, inputs))
        counts.append(devices.num_compilations(device))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("xla", marks=pytest.mark.torch_xla)]
)
def test_rows_of_logits_that_are_no_numbers_have_no_token(device):
    logits = torch.zeros(6, 5)
    logits[:, 3] = 1.0
    logits[1, 2], logits[2, 0], logits[3, 4] = torch.nan, torch.inf, -torch.inf
    logits[4] = -torch.inf
    logits[5, 3] = torch.nan
    on_device = logits.to(devices.open_device(device))
    tokens = marking(greedy)(on_device).tolist()
    assert tokens == [3, NO_TOKEN, NO_TOKEN, 3, NO_TOKEN, NO_TOKEN]

"""The README's decoder equals dense attention: eager, lazy and under torch.compile."""

import copy

import pytest
import torch

import torch_rpa
from tests.test_readme import README, block, run

PAGE_SIZE = 8
# Tokens that each of two sequences brings to each step, and the padded T. The second
# sequence begins later, and crosses a page.
STEPS = [((9, 0), 16), ((1, 5), 16), ((1, 1), 4), ((1, 1), 4), ((1, 1), 4), ((1, 1), 4)]


@pytest.fixture(scope="module")
def model():
    names: dict = {}
    run(block("module example"), README, names)
    torch.manual_seed(1)
    return names["Decoder"]().eval()


def texts():
    generator = torch.Generator().manual_seed(2)
    lengths = [sum(lengths[i] for lengths, _ in STEPS) for i in range(2)]
    return [torch.randint(0, 64, (n,), generator=generator) for n in lengths]


def dense(model, tokens):
    """The logits of one sequence in float64, without a cache."""
    weights = {name: w.double() for name, w in model.state_dict().items()}
    x = weights["embed.weight"][tokens]
    for index, layer in enumerate(model.layers):
        prefix = f"layers.{index}."
        split, join = (
            (weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"])
            for name in ("split", "join")
        )
        heads = (x @ split[0].T + split[1]).view(len(x), -1, layer.head_dim)
        q, k, v = heads.split(layer.sizes, dim=1)
        group = layer.sizes[0] // layer.sizes[1]
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * layer.head_dim**-0.5
        future = torch.ones(len(x), len(x)).triu(1).bool()
        weights_of_keys = scores.masked_fill(future, -torch.inf).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", weights_of_keys, v).flatten(1)
        x = x + out @ join[0].T + join[1]
    return x @ weights["embed.weight"].T


def step_inputs(done, lengths, size):
    """The tokens of a step and its batch, padded to a static size."""
    rows = [i for i in range(2) if lengths[i]]
    rows.sort(key=lambda i: lengths[i] > 1)  # decodes first
    tokens = [texts()[i][done[i] : done[i] + lengths[i]] for i in rows]
    num_decodes = sum(lengths[i] == 1 for i in rows)
    starts = [0]
    for i in rows:
        starts.append(starts[-1] + lengths[i])
    pages = [[2, 0], [3, 1]]
    batch = (
        [done[i] + lengths[i] for i in rows] + [0] * (2 - len(rows)),
        [page for i in [*rows, *[0] * (2 - len(rows))] for page in pages[i]],
        starts + starts[-1:] * (2 - len(rows)),
        [num_decodes, num_decodes, len(rows)],
    )
    padding = torch.zeros(size - starts[-1], dtype=torch.long)
    return rows, torch.cat([*tokens, padding]), [torch.tensor(t).int() for t in batch]


@pytest.mark.parametrize("mode", ["eager", "lazy", "openxla"])
@torch.no_grad()
def test_the_decoder_of_the_readme_equals_dense_attention(model, mode):
    device = "cpu"
    if mode != "eager":
        device = pytest.importorskip("torch_xla").device()
    moved = copy.deepcopy(model).to(device)
    caches = [
        torch_rpa.empty_kv_cache(
            4, PAGE_SIZE, 2, 32, dtype=torch.float32, device=device
        )
        for _ in moved.layers
    ]
    sync(mode)
    torch._dynamo.reset()
    function = moved
    if mode == "openxla":
        function = torch.compile(moved, backend="openxla", fullgraph=True)
    expected = [dense(model, tokens) for tokens in texts()]
    # Both sum in float32, in different orders.
    bound = 64 * torch.finfo(torch.float32).eps * max(e.abs().max() for e in expected)
    done = [0, 0]
    for lengths, size in STEPS:
        rows, tokens, batch = step_inputs(done, lengths, size)
        batch = [tensor.to(device) for tensor in batch]
        logits = function(tokens.to(device), caches, batch)
        sync(mode)
        logits = logits.cpu().double()
        for row, start in zip(rows, batch[2].cpu().tolist(), strict=False):
            new = slice(done[row], done[row] + lengths[row])
            got = logits[start : start + lengths[row]]
            assert (got - expected[row][new]).abs().max() <= bound
            done[row] = new.stop
    assert done == [len(tokens) for tokens in texts()]


def sync(mode):
    if mode != "eager":
        import torch_xla

        torch_xla.sync()

"""The cache is updated in its own buffer, in lazy mode and under torch.compile.

Three checks, each of which a copy would fail: torch_xla aliases the parameter in what
it compiles, the buffer keeps its address over the steps, and the values are right. The
fourth, that no copy is left in a program for a TPU, is in test_tpu_graph.py.
"""

import pytest
import torch

torch_xla = pytest.importorskip("torch_xla")

import torch_xla.core.xla_model as xm  # noqa: E402
import torch_xla.debug.metrics as xla_metrics  # noqa: E402

from tests.torch_rpa.calls import assert_same_up_to_rounding, make_call, raw_bytes  # noqa: E402
from torch_rpa import ops  # noqa: E402


def layers(*tensors):
    """Two layers with a cache each; the second attends with the first's output."""
    q, k, v, first_cache, second_cache, *metadata = tensors
    out = ops.ragged_paged_attention(q, k, v, first_cache, *metadata, sm_scale=0.1)
    return ops.ragged_paged_attention(out, k, v, second_cache, *metadata, sm_scale=0.1)


def compiled_layers():
    torch._dynamo.reset()
    return torch.compile(layers, backend="openxla", fullgraph=True)


def two_layer_call(device, **arguments):
    call = make_call(device=device, **arguments)
    other = make_call(device=device, seed=1, **arguments)
    return [*call[:4], other.kv_cache, *call[4:8]]


def pointer(tensor):
    xm.wait_device_ops()
    return torch_xla._XLAC._unsafe_buffer_pointer(tensor)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lazy", "openxla"])
@pytest.mark.parametrize(
    "cache_dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8], ids=str
)
def test_caches_stay_in_their_buffers(mode, cache_dtype):
    arguments = {"cache_dtype": cache_dtype, "dtype": torch.float32}
    expected_tensors = two_layer_call("cpu", **arguments)
    tensors = two_layer_call(torch_xla.device(), **arguments)
    caches, expected_caches = tensors[3:5], expected_tensors[3:5]
    torch_xla.sync(wait=True)
    pointers = [pointer(cache) for cache in caches]
    step = layers if mode == "lazy" else compiled_layers()

    xla_metrics.clear_all()
    for _ in range(4):
        tensors[0] = tensors[0] * 1.0  # a new buffer each step, like hidden states
        torch_xla.sync()
        out = step(*tensors)
        torch_xla.sync(wait=True)
        assert [pointer(cache) for cache in caches] == pointers
    assert max(count for _, count in aliased_parameters()) == 2
    expected = layers(*expected_tensors)
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        assert torch.equal(raw_bytes(cache), raw_bytes(expected_cache))
    scale = expected.abs().max().item()
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0.01 * scale)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("mode", ["lazy", "openxla"])
def test_every_layer_keeps_its_own_buffer(mode, order):
    """XLA pairs donated buffers with outputs of their size by order, not by use.

    Swapped buffers would be right on a CPU, but on a TPU each would cost a copy.
    """
    tokens = torch.zeros(24, dtype=torch.int32).to(torch_xla.device())
    calls = [make_call(device=torch_xla.device(), seed=seed) for seed in range(3)]
    caches = [call.kv_cache for call in calls]
    q, k, v, _, *metadata = calls[0][:8]
    torch_xla.sync(wait=True)
    pointers = [pointer(cache) for cache in caches]

    def step(hidden, tokens, k, v, caches, metadata):
        for layer in order:
            hidden = ops.ragged_paged_attention(hidden, k, v, caches[layer], *metadata)
        # An older tensor than all caches, which depends on all layers.
        tokens.add_(hidden.sum((1, 2)).to(torch.int32))
        return hidden

    torch._dynamo.reset()
    function = step if mode == "lazy" else torch.compile(step, backend="openxla")
    for _ in range(3):
        function(q, tokens, k, v, caches, metadata)
        torch_xla.sync(wait=True)
        assert [pointer(cache) for cache in caches] == pointers


def aliased_parameters():
    """(time, number of aliased parameters) of each compilation."""
    return xla_metrics.metric_data("InputOutputAliasCount")[2]


def test_torch_compile_compiles_once_for_changing_lengths():
    tensors = two_layer_call(torch_xla.device(), page_size=16)
    torch_xla.sync(wait=True)
    step = compiled_layers()
    xla_metrics.clear_all()
    for length in range(9, 30):
        kv_lens = torch.tensor([length, 8, 9, 30, 0], dtype=torch.int32)
        tensors[5] = kv_lens.to(torch_xla.device())
        step(*tensors)
    assert xla_metrics.metric_data("CompileTime")[0] == 1


@pytest.mark.slow
def test_a_result_read_before_the_sync_is_right():
    call, expected_call = make_call(device=torch_xla.device()), make_call()
    for _ in range(3):
        out = ops.ragged_paged_attention(*call)
        expected = ops.ragged_paged_attention(*expected_call)
        assert_same_up_to_rounding(out, expected)
    torch_xla.sync()
    assert torch.equal(call.kv_cache.cpu(), expected_call.kv_cache)


@pytest.mark.parametrize("mode", ["lazy", "openxla"])
def test_a_clone_of_the_cache_keeps_its_values(mode):
    """torch_xla's clones share a buffer until one of them is written."""
    call = make_call(device=torch_xla.device())
    before = make_call().kv_cache
    torch_xla.sync()

    def step(*tensors):
        cache = tensors[3].clone()
        out = ops.ragged_paged_attention(*tensors[:3], cache, *tensors[4:])
        return out, cache

    torch._dynamo.reset()
    function = step if mode == "lazy" else torch.compile(step, backend="openxla")
    for _ in range(2):
        _, cache = function(*call[:8])
        torch_xla.sync()
        assert torch.equal(call.kv_cache.cpu(), before)
        assert not torch.equal(cache.cpu(), before)


@pytest.mark.parametrize("mode", ["lazy", "openxla"])
def test_layers_may_be_views_of_one_stacked_cache(mode):
    call, expected_call = make_call(device=torch_xla.device()), make_call()

    def step(stacked, *tensors):
        for layer in range(2):
            ops.ragged_paged_attention(*tensors[:3], stacked[layer], *tensors[3:])

    expected_stack = torch.stack([expected_call.kv_cache, expected_call.kv_cache])
    step(expected_stack, *expected_call[:3], *expected_call[4:8])
    stacked = torch.stack([call.kv_cache, call.kv_cache])
    torch_xla.sync()
    torch._dynamo.reset()
    function = step if mode == "lazy" else torch.compile(step, backend="openxla")
    function(stacked, *call[:3], *call[4:8])
    torch_xla.sync()
    assert torch.equal(stacked.cpu(), expected_stack)


def test_a_partitioned_graph_does_not_give_the_cache_away_early():
    """An operator without XLA lowering splits the graph; the first part reads it.

    Its result has the size of the cache, so it would take over a donated buffer.
    """

    def step(*tensors):
        doubled = tensors[3] * 2
        factor = torch.special.i0(doubled.float().sum() * 0)  # = 1, not lowered
        q = tensors[0] * factor
        return doubled, ops.ragged_paged_attention(q, *tensors[1:], sm_scale=0.1)

    call, expected_call = make_call(device=torch_xla.device()), make_call()
    torch_xla.sync(wait=True)
    torch._dynamo.reset()
    function = torch.compile(step, backend="openxla")
    for _ in range(2):
        doubled, out = function(*call[:8])
        torch_xla.sync()
        expected_doubled, expected = step(*expected_call[:8])
        assert torch.equal(doubled.cpu(), expected_doubled)
        assert_same_up_to_rounding(out, expected)
        assert torch.equal(call.kv_cache.cpu(), expected_call.kv_cache)

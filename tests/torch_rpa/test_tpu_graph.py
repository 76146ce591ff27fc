"""torch_xla graphs with the Pallas kernel, compiled for TPUs without a TPU.

The real compiler says whether the cache is copied: a copy would be an operation that
produces an array of the cache's shape, or temporary memory of its size.
"""

import contextlib
import importlib.util
import itertools
from typing import Any

import pytest
import torch

torch_xla = pytest.importorskip("torch_xla")

import torch_xla.core.dynamo_bridge as dynamo_bridge  # noqa: E402
import torch_xla.runtime as xla_runtime  # noqa: E402

from tests.torch_rpa.calls import make_call  # noqa: E402
from tests.torch_rpa.tpu_compiler import compile_for_tpu, graph_of  # noqa: E402
from torch_rpa import ops  # noqa: E402
from torch_rpa.bridges import torch_xla as xla_bridge  # noqa: E402

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
    ),
    pytest.mark.skipif(
        xla_runtime.device_type() != "CPU", reason="torch_xla itself holds libtpu"
    ),
]

CHIPS = ["tpu7x", "v6e"]
SIZES: dict[str, Any] = {
    "page_size": 128,
    "num_pages": 256,
    "dtype": torch.bfloat16,
    "num_q_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
}
CACHES = {
    "bf16": (torch.bfloat16, "bf16[256,16,64,2,128]", "256x16x64x2x128xbf16"),
    "fp8": (
        torch.float8_e4m3fn,
        "f8e4m3fn[256,16,32,4,128]",
        "256x16x32x4x128xf8E4M3FN",
    ),
}


def layers(q, k, v, first_cache, second_cache, *metadata):
    """Two layers and some work around them, as in a model."""
    out = ops.ragged_paged_attention(q, k, v, first_cache, *metadata, sm_scale=0.1)
    out = torch.relu(out)
    return ops.ragged_paged_attention(out, k, v, second_cache, *metadata, sm_scale=0.1)


def two_layer_call(cache_dtype):
    arguments = SIZES | {"cache_dtype": cache_dtype, "device": torch_xla.device()}
    call, other = make_call(**arguments), make_call(**arguments, seed=1)
    torch_xla.sync(wait=True)
    return [*call[:4], other.kv_cache, *call[4:8]]


def lowered_for(chip):
    return xla_bridge.lowering_target(xla_bridge.Target("tpu", chip, "pallas"))


def lazy_graph(tensors, chip):
    with lowered_for(chip):
        out = layers(*tensors)
    # The order in which torch_xla outputs what has to be computed.
    outputs = [out, *tensors[3:5]]
    return graph_of(sorted(outputs, key=torch_xla._XLAC._xla_get_tensor_id))


class GraphTaken(Exception):
    """Stops torch_xla before it compiles a TPU graph for the CPU."""


def openxla_graph(tensors, chip, monkeypatch):
    """The graph of torch.compile, and which of the caches it marks as donated."""
    taken = {}

    def take(outputs, _devices):
        taken["graph"] = graph_of(outputs)
        inputs = dynamo_bridge.torch_xla._XLAC._get_tensors_xla_device_data_node(
            outputs
        )
        taken["donated"] = {
            tensor_id
            for tensor_id, tensor in zip(*inputs, strict=True)
            if torch_xla._XLAC._get_buffer_donation(tensor)
        }
        raise GraphTaken

    cache_ids = {torch_xla._XLAC._xla_get_tensor_id(cache) for cache in tensors[3:5]}
    monkeypatch.setattr(torch_xla._XLAC, "_xla_warm_up_cache", take)
    torch._dynamo.reset()
    with lowered_for(chip), contextlib.suppress(GraphTaken):
        torch.compile(layers, backend="openxla", fullgraph=True)(*tensors)
    torch_xla._XLAC._clear_pending_irs(str(torch_xla.device()))
    assert taken["donated"] == cache_ids
    return taken["graph"]


# Each mode with both caches and on both chips, each cache on both chips; the other
# combinations are left to a longer run.
GRAPHS = [
    ("lazy", "bf16", "tpu7x"),
    ("lazy", "fp8", "v6e"),
    ("openxla", "bf16", "v6e"),
    ("openxla", "fp8", "tpu7x"),
]
MORE_GRAPHS = [
    pytest.param(*graph, marks=pytest.mark.extended)
    for graph in itertools.product(("lazy", "openxla"), CACHES, CHIPS)
    if graph not in GRAPHS
]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "cache", "chip"), [*GRAPHS, *MORE_GRAPHS])
def test_no_copy_of_the_cache_remains(mode, cache, chip, monkeypatch):
    cache_dtype, hlo_shape, mlir_shape = CACHES[cache]
    tensors = two_layer_call(cache_dtype)
    if mode == "lazy":
        graph = lazy_graph(tensors, chip)
    else:
        graph = openxla_graph(tensors, chip, monkeypatch)
    compiled = compile_for_tpu(graph, chip, mlir_shape)
    cache_bytes = tensors[3].numel() * tensors[3].itemsize

    # Each cache goes from its parameter through its kernel calls to its output.
    assert compiled.num_aliased_parameters == 2
    assert compiled.memory.alias_size_in_bytes == 2 * cache_bytes
    assert compiled.memory.temp_size_in_bytes < cache_bytes // 8
    passing_on = {"parameter", "get-tuple-element", "bitcast"}
    assert set(compiled.operations_producing(hlo_shape)) <= passing_on
    for line in compiled.kernel_calls:
        assert "output_to_operand_aliasing" in line
    assert len(compiled.kernel_calls) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_a_cache_that_is_only_read_is_neither_aliased_nor_copied(chip):
    cache_dtype, hlo_shape, mlir_shape = CACHES["bf16"]
    q, _, _, first_cache, _, *metadata = two_layer_call(cache_dtype)
    with lowered_for(chip):
        out = ops.ragged_paged_attention(
            q, None, None, first_cache, *metadata, update_kv_cache=False
        )
    compiled = compile_for_tpu(graph_of([out]), chip, mlir_shape)
    assert compiled.num_aliased_parameters == 0
    assert set(compiled.operations_producing(hlo_shape)) == {"parameter"}
    assert compiled.memory.temp_size_in_bytes < first_cache.numel() // 8


@pytest.mark.slow
def test_the_check_would_see_a_copy():
    """The cache stays in use after the call, so the compiler has to copy it."""
    cache_dtype, hlo_shape, mlir_shape = CACHES["bf16"]
    q, k, v, first_cache, _, *metadata = two_layer_call(cache_dtype)
    with lowered_for("v6e"):
        out, new_cache = ops.ragged_paged_attention_functional(
            q, k, v, first_cache, *metadata
        )
    graph = graph_of([out, new_cache, first_cache + 0])
    compiled = compile_for_tpu(graph, "v6e", mlir_shape)
    produced = set(compiled.operations_producing(hlo_shape))
    assert produced & {"copy", "copy-done", "fusion"}

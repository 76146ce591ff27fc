"""The whole of a step, sampling included, through the real compiler for TPUs."""

import importlib.util

import pytest
import torch

torch_xla = pytest.importorskip("torch_xla")

import torch_xla.runtime as xla_runtime  # noqa: E402

from tests.support.tiny_llama import build_llama  # noqa: E402
from tests.torch_rpa.tpu_compiler import compile_for_tpu, graph_of  # noqa: E402
from torch_rpa.bridges import torch_xla as xla_bridge  # noqa: E402
from torch_rpa.serving import Engine, EngineOptions, SamplingParams  # noqa: E402

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
    ),
    pytest.mark.skipif(
        xla_runtime.device_type() != "CPU", reason="torch_xla itself holds libtpu"
    ),
]
# Pages of 128 tokens, two heads of 128, two bfloat16 in 32 bits; too large for the
# compiler to keep it in VMEM.
CACHE, CACHE_TYPE = "bf16[1001,4,64,2,128]", "1001x4x64x2x128xbf16"


class GraphTaken(BaseException):
    """Stops the engine before a TPU graph is compiled for the CPU; no ``Exception``."""


@pytest.mark.slow
def test_a_step_that_samples_keeps_its_caches_in_place(monkeypatch):
    model = build_llama("rpa", head_dim=128).to(torch.bfloat16)
    options = EngineOptions(
        max_num_sequences=8,
        max_sequence_length=512,
        page_size=128,
        num_pages=1001,
        device="xla",
    )
    engine = Engine(model, options)
    taken = {}

    def take():
        outputs = [engine._steps.last_generated, *engine._runner.kv_caches]
        outputs.sort(key=torch_xla._XLAC._xla_get_tensor_id)
        taken["graph"] = graph_of(outputs)
        raise GraphTaken

    monkeypatch.setattr(engine._runner, "sync", take)
    engine.add_request([1, 2, 3], SamplingParams(temperature=0.7, top_k=9, top_p=0.9))
    with (
        xla_bridge.lowering_target(xla_bridge.Target("tpu", "v6e", "pallas")),
        pytest.raises(GraphTaken),
    ):
        engine.step()

    compiled = compile_for_tpu(taken["graph"], "v6e", CACHE_TYPE)
    assert len(compiled.kernel_calls) == 2  # a layer each
    assert compiled.num_aliased_parameters == 2
    passing_on = {"parameter", "get-tuple-element", "bitcast"}
    assert set(compiled.operations_producing(CACHE)) <= passing_on
    assert " sort(" not in compiled.text

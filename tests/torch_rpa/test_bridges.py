"""What a bridge defines, and that one more needs a file and an entry, nothing else.

``tests/support/lazy_bridge.py`` is that one more: it serves torch's own lazy device.
"""

import ast
import inspect
from pathlib import Path

import pytest
import torch

import torch_rpa
from tests.support.tiny_llama import build_llama
from tests.torch_rpa.calls import make_call
from torch_rpa import bridges, devices, ops
from torch_rpa import transformers as rpa_transformers
from torch_rpa.generate.__main__ import main
from torch_rpa.serving import Engine, EngineOptions, SamplingParams

PACKAGE = Path(torch_rpa.__file__).parent
# Rooms that know torch_xla: its bridge, and its way to shard over devices.
KNOW_TORCH_XLA = ("bridges/torch_xla.py", "spmd.py")
KNOW_THE_NAME = (*KNOW_TORCH_XLA, "bridges/__init__.py")
PROMPTS = [[5, 17, 3], [9]]


@pytest.fixture
def calls(monkeypatch):
    """Plugs the bridge in; gives what reached it."""
    entry = bridges.Entry("tests.support.lazy_bridge", framework="torch")
    monkeypatch.setitem(bridges.BRIDGES, "lazy", entry)
    from tests.support import lazy_bridge

    monkeypatch.setattr(lazy_bridge, "calls", [])
    return lazy_bridge.calls


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def nodes(path: Path):
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_its_bridge_knows_torch_xla(path):
    room = str(path.relative_to(PACKAGE))
    imported, strings = set(), set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            imported.add(module.partition(".")[0])
            imported |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.add(node.value.lower())
    if room not in KNOW_TORCH_XLA:
        assert not imported & {"torch_xla", "torch_rpa.bridges.torch_xla"}
    if room not in KNOW_THE_NAME:
        assert not strings & {"xla", "torch_xla"}


@pytest.mark.parametrize("device_type", [*bridges.BRIDGES, "lazy"])
def test_a_bridge_defines_what_the_protocol_lists(device_type, calls):
    entry = bridges.BRIDGES[device_type]
    pytest.importorskip(entry.framework)
    bridge = bridges.find(device_type)
    assert isinstance(bridge, bridges.Bridge)
    for name, method in inspect.getmembers(bridges.Bridge, inspect.isfunction):
        if name.startswith("_"):
            continue
        _, *expected = inspect.signature(method).parameters.values()
        got = inspect.signature(getattr(bridge, name)).parameters.values()
        assert [(p.name, p.kind, p.default) for p in got] == [
            (p.name, p.kind, p.default) for p in expected
        ]


# ---- one more bridge


def test_the_operator_reaches_the_bridge(calls):
    device = devices.open_device("lazy")
    call, expected_call = make_call(device=device), make_call()
    expected = ops.ragged_paged_attention(*expected_call, sm_scale=0.1)
    out = ops.ragged_paged_attention(*call, sm_scale=0.1)
    devices.sync(device)
    assert torch.equal(out.cpu(), expected)
    assert torch.equal(call.kv_cache.cpu(), expected_call.kv_cache)
    assert calls == ["open", "donating call", "update", "sync"]

    out = ops.ragged_paged_attention(*call, sm_scale=0.1, update_kv_cache=False)
    assert torch.equal(out.cpu(), expected)
    _, new_cache = ops.ragged_paged_attention_functional(*call, sm_scale=0.1)
    assert torch.equal(new_cache.cpu(), expected_call.kv_cache)
    assert calls[4:] == ["call", "call"]


def test_the_function_reaches_the_bridge(calls):
    device = devices.open_device("lazy")
    call = make_call(device=device)
    expected = torch_rpa.ragged_paged_attention(*make_call())
    out = torch_rpa.ragged_paged_attention(*call, impl="reference")
    assert torch.equal(out.cpu(), expected)
    assert calls[1:3] == ["reference on lazy:0", "donating call"]
    with pytest.raises(ValueError, match="kv_lens must be"):
        torch_rpa.ragged_paged_attention(*call._replace(kv_lens=call.kv_lens.long()))


def test_transformers_reach_the_bridge(calls):
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([PROMPTS[0]])
    tokens = [
        model.generate(ids, custom_generate=rpa_transformers.generate, **arguments)
        for model in (build_llama("rpa"), build_llama("rpa").to("lazy"))
    ]
    assert torch.equal(*tokens)
    assert calls.count("compiled") == 4
    assert calls.count("sync") >= 4


def test_serving_reaches_the_bridge(calls):
    params = SamplingParams(max_new_tokens=4)
    texts = []
    for device in ("cpu", "lazy"):
        options = EngineOptions(
            max_num_sequences=2,
            max_tokens_per_step=8,
            max_sequence_length=32,
            device=device,
        )
        engine = Engine(build_llama("rpa"), options)
        outputs = engine.generate_batch(PROMPTS, params)
        texts.append([output.generated_tokens for output in outputs.values()])
    assert texts[0] == texts[1]
    assert calls[0] == "open"
    assert engine.stats.num_compilations > 0
    assert engine.stats.max_compilations is None  # a step is no single program


def test_the_command_reaches_the_bridge(calls, capsys):
    arguments = ["--prompt", "a", "--max-new-tokens", "3", "--check"]
    assert main(["--device", "lazy", *arguments]) == 0
    assert "check passed: 3 tokens" in capsys.readouterr().out
    assert "multiply in float32" in calls and "compiled" in calls


# ---- devices


def test_the_cpu_needs_no_bridge():
    device = devices.open_device("cpu")
    assert device == torch.device("cpu")
    assert not devices.is_compiled(device) and not devices.is_lazy(device)
    assert devices.num_compilations(device) == 0
    assert devices.compiled(len, device) is len
    devices.sync(device, wait=True)


def test_devices_are_named(calls, monkeypatch):
    assert devices.names() == ("xla", "lazy", "cpu")
    missing = bridges.Entry("tests.support.lazy_bridge", framework="no_such_package")
    monkeypatch.setitem(bridges.BRIDGES, "xla", missing)
    assert devices.usual_name() == "lazy"
    with pytest.raises(
        ValueError, match=r"'xla' needs the package no_such_package.* or use 'lazy'"
    ):
        devices.open_device("xla")
    monkeypatch.setitem(bridges.BRIDGES, "lazy", missing)
    assert devices.usual_name() == "cpu"


@pytest.mark.parametrize("device", ["cuda", "tpu:0", "nonsense"])
def test_an_unknown_device_is_named_with_those_that_there_are(device):
    with pytest.raises(ValueError, match=f"must be 'xla' or 'cpu', got '{device}'"):
        devices.open_device(device)


def test_another_device_than_that_of_the_process_is_an_error():
    pytest.importorskip("torch_xla")
    with pytest.raises(ValueError, match=r"device must be xla:0.*, got xla:1"):
        devices.open_device("xla:1")
    device = devices.open_device("xla")
    assert devices.is_lazy(device) and devices.is_compiled(device)

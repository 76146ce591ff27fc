"""One more bridge, for torch's own lazy device; run by test_bridges.py.

In a process of its own, because that device cannot share one with torch_xla's.
"""

import pytest
import torch

import torch_rpa
from tests.support import lazy_bridge
from tests.support.bridge_check import assert_is_bridge
from tests.support.tiny_llama import build_llama
from tests.torch_rpa.calls import make_call
from torch_rpa import bridges, devices, ops
from torch_rpa import transformers as rpa_transformers
from torch_rpa.generate.__main__ import main
from torch_rpa.serving import Engine, EngineOptions, SamplingParams

PROMPTS = [[5, 17, 3], [9]]


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list[str]:
    """Plugs the bridge in; gives what reached it."""
    entry = bridges.Entry("tests.support.lazy_bridge", "torch", extra="lazy")
    monkeypatch.setitem(bridges.BRIDGES, "lazy", entry)
    monkeypatch.setattr(lazy_bridge, "calls", [])
    return lazy_bridge.calls


def test_it_is_a_bridge():
    assert_is_bridge(bridges.find("lazy"))


def test_the_operator_reaches_the_bridge(calls):
    device = devices.open_device("lazy")
    call, expected_call = make_call(device=device), make_call()
    expected = ops.ragged_paged_attention(*expected_call, sm_scale=0.1)
    out = ops.ragged_paged_attention(*call, sm_scale=0.1)
    devices.sync(device)
    torch.testing.assert_close(out.cpu(), expected)
    assert torch.equal(call.kv_cache.cpu(), expected_call.kv_cache)
    assert calls == ["open", "donating call", "update", "sync"]

    out = ops.ragged_paged_attention(*call, sm_scale=0.1, update_kv_cache=False)
    torch.testing.assert_close(out.cpu(), expected)
    _, new_cache = ops.ragged_paged_attention_functional(*call, sm_scale=0.1)
    assert torch.equal(new_cache.cpu(), expected_call.kv_cache)
    assert calls[4:] == ["call", "call"]


def test_the_function_reaches_the_bridge(calls):
    device = devices.open_device("lazy")
    call = make_call(device=device)
    expected = torch_rpa.ragged_paged_attention(*make_call())
    out = torch_rpa.ragged_paged_attention(*call, impl="reference")
    torch.testing.assert_close(out.cpu(), expected)
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


@pytest.mark.parametrize("in_block", [False, True])
def test_generate_compiles_nothing_if_asked(calls, in_block):
    model = build_llama("rpa").to("lazy")
    arguments = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    arguments |= {"disable_compile": True}
    ids = torch.tensor([PROMPTS[0]])
    if in_block:
        with rpa_transformers.paged_generation(model):
            model.generate(ids, **arguments)
    else:
        generate = rpa_transformers.generate
        model.generate(ids, custom_generate=generate, **arguments)
    assert "call" in " ".join(calls) and "compiled" not in calls


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


def test_the_command_reaches_the_bridge(calls, capsys):
    arguments = ["--prompt", "a", "--max-new-tokens", "3", "--check"]
    assert main(["--device", "lazy", *arguments]) == 0
    assert "check passed: 3 tokens" in capsys.readouterr().out
    assert "multiply in float32" in calls and "compiled" in calls


def test_devices_are_named(calls, monkeypatch):
    assert devices.names() == ("xla", "tpu", "lazy", "cpu")
    missing = bridges.Entry("tests.support.lazy_bridge", "no_such_package", "extra")
    monkeypatch.setitem(bridges.BRIDGES, "xla", missing)
    monkeypatch.setitem(bridges.BRIDGES, "tpu", missing)
    assert devices.usual_name() == "lazy"
    with pytest.raises(
        ValueError, match=r"'xla' needs no_such_package, which is not .* or use 'lazy'"
    ):
        devices.open_device("xla")
    monkeypatch.setitem(bridges.BRIDGES, "lazy", missing)
    assert devices.usual_name() == "cpu"

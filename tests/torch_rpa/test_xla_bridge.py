"""The XLA implementation: values, lowering once, and no device opened by JAX."""

import os
import subprocess
import sys
import textwrap
import time
from typing import Any

import pytest
import torch

torch_xla = pytest.importorskip("torch_xla")

import torch_xla.debug.metrics as xla_metrics  # noqa: E402
import torch_xla.runtime as xla_runtime  # noqa: E402

import torch_rpa  # noqa: E402
from tests.torch_rpa.calls import (  # noqa: E402
    assert_matches_oracle,
    assert_same_up_to_rounding,
    from_batch,
    make_call,
    raw_bytes,
)
from tests.torch_rpa.scenarios import SCENARIOS, make_scenario  # noqa: E402
from torch_rpa import ops, validation  # noqa: E402
from torch_rpa.bridges import torch_xla as xla_bridge  # noqa: E402

on_xla_cpu = pytest.mark.skipif(
    xla_runtime.device_type() != "CPU", reason="for the XLA CPU device"
)


def xla_call(**arguments):
    return make_call(device=torch_xla.device(), **arguments)


def assert_xla_matches_eager(options, **arguments):
    """The cache must agree in every byte, the output up to the order of sums."""
    call, expected_call = xla_call(**arguments), make_call(**arguments)
    expected = ops.ragged_paged_attention(*expected_call, **options)
    out = ops.ragged_paged_attention(*call, **options)
    torch_xla.sync()
    assert_same_up_to_rounding(out, expected)
    assert call.kv_cache.dtype == expected_call.kv_cache.dtype
    assert torch.equal(raw_bytes(call.kv_cache), raw_bytes(expected_call.kv_cache))


@pytest.mark.slow
@on_xla_cpu
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize(
    "cache_dtype",
    [
        torch.bfloat16,
        torch.float32,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int8,
    ],
    ids=str,
)
def test_xla_carries_every_cache_dtype(cache_dtype, head_dim):
    options = {"sm_scale": head_dim**-0.5}
    if cache_dtype.itemsize == 1:
        options |= {"k_scale": 0.25, "v_scale": 0.5}
    assert_xla_matches_eager(options, head_dim=head_dim, cache_dtype=cache_dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_xla_matches_the_float64_oracle(name):
    batch, options, oracle_options = make_scenario(name)
    call = from_batch(batch, torch_xla.device())
    out = torch_rpa.ragged_paged_attention(*call, **options)
    torch_xla.sync()
    assert_matches_oracle(out, call, batch, **oracle_options)


@on_xla_cpu
def test_reading_a_cache_leaves_it_alone():
    call, expected_call = xla_call(), make_call()
    expected = ops.ragged_paged_attention(
        *expected_call._replace(k=None, v=None), update_kv_cache=False
    )
    torch_xla.sync(wait=True)
    pointer = torch_xla._XLAC._unsafe_buffer_pointer(call.kv_cache)
    out = ops.ragged_paged_attention(
        *call._replace(k=None, v=None), update_kv_cache=False
    )
    torch_xla.sync(wait=True)
    assert_same_up_to_rounding(out, expected)
    assert torch_xla._XLAC._unsafe_buffer_pointer(call.kv_cache) == pointer
    assert torch.equal(call.kv_cache.cpu(), expected_call.kv_cache)


def test_the_functional_operator_leaves_the_cache_alone():
    call, expected_call = xla_call(), make_call()
    torch_xla.sync()
    _, new_cache = ops.ragged_paged_attention_functional(*call)
    torch_xla.sync()
    assert torch.equal(call.kv_cache.cpu(), expected_call.kv_cache)
    ops.ragged_paged_attention(*expected_call)
    assert torch.equal(new_cache.cpu(), expected_call.kv_cache)


def test_impl_reference_runs_on_xla_tensors():
    call, expected_call = xla_call(), make_call()
    expected = torch_rpa.ragged_paged_attention(*expected_call, impl="reference")
    out = torch_rpa.ragged_paged_attention(*call, impl="reference")
    assert_same_up_to_rounding(out, expected)


# ---- lowering


def test_a_signature_is_lowered_once(monkeypatch):
    lowered = []
    lower = xla_bridge._lower

    def counting_lower(*arguments):
        lowered.append(arguments)
        return lower(*arguments)

    monkeypatch.setattr(xla_bridge, "_lower", counting_lower)
    first = xla_call(page_size=16)
    for _ in range(2):
        ops.ragged_paged_attention(*first, soft_cap=31.0)
    ops.ragged_paged_attention(*xla_call(page_size=16, seed=1), soft_cap=31.0)
    assert len(lowered) == 1
    ops.ragged_paged_attention(*first, soft_cap=32.0)
    ops.ragged_paged_attention(*xla_call(page_size=32), soft_cap=31.0)
    assert len(lowered) == 3
    torch_xla.sync()


def test_one_program_serves_all_values_of_scales(monkeypatch):
    lowered = []
    lower = xla_bridge._lower

    def counting_lower(*arguments):
        lowered.append(arguments)
        return lower(*arguments)

    monkeypatch.setattr(xla_bridge, "_lower", counting_lower)
    shape = {"page_size": 16, "cache_dtype": torch.int8}
    xla_metrics.clear_all()
    for scale in (0.03, 0.05):
        scales: dict[str, Any] = {
            "k_scale": torch.tensor([scale, 0.04]),
            "v_scale": torch.tensor(0.02),
        }
        moved: dict[str, Any] = {
            name: x.to(torch_xla.device()) for name, x in scales.items()
        }
        call, expected_call = xla_call(**shape), make_call(**shape)
        expected = torch_rpa.ragged_paged_attention(*expected_call, **scales)
        torch_xla.sync()
        out = torch_rpa.ragged_paged_attention(*call, **moved)
        torch_xla.sync()
        assert_same_up_to_rounding(out, expected)
        assert torch.equal(raw_bytes(call.kv_cache), raw_bytes(expected_call.kv_cache))
    assert len(lowered) == 1


def test_fifty_decode_steps_with_changing_lengths_compile_once():
    call = xla_call(page_size=32)
    xla_metrics.clear_all()
    for step in range(50):
        # Sequences grow and end, host metadata goes to the device as in serving.
        live = 4 - step // 20
        kv_lens = torch.tensor([9 + step, 30 + step, 2 * step + 1, 1, 0])
        page_indices = torch.arange(20).roll(step)
        cu_q_lens = torch.arange(6)
        distribution = torch.tensor([live, live, live])
        metadata = [
            tensor.to(torch.int32).to(torch_xla.device())
            for tensor in (kv_lens, page_indices, cu_q_lens, distribution)
        ]
        ops.ragged_paged_attention(*call[:4], *metadata, sm_scale=0.125)
        torch_xla.sync()
    assert xla_metrics.metric_data("CompileTime")[0] == 1
    assert not xla_metrics.executed_fallback_ops()


def test_lowering_restores_the_configuration_of_jax():
    import jax

    def settings():
        values = jax.config.values
        return values["jax_use_shardy_partitioner"], values["jax_enable_x64"]

    before = settings()
    ops.ragged_paged_attention(*xla_call(), soft_cap=33.0)
    torch_xla.sync()
    assert settings() == before


@pytest.mark.slow
@on_xla_cpu  # a second process cannot have the TPU
def test_jax_opens_no_device_but_the_cpu():
    """In a new process, with libtpu installed and JAX_PLATFORMS asking for the TPU."""
    code = textwrap.dedent("""
        import torch_xla
        from tests.torch_rpa.calls import make_call
        from torch_rpa import ops

        call = make_call(device=torch_xla.device())
        ops.ragged_paged_attention(*call)
        torch_xla.sync()
        from jax._src import xla_bridge
        assert set(xla_bridge._backends) <= {"cpu"}, xla_bridge._backends
    """)
    environment = os.environ | {"JAX_PLATFORMS": "tpu,cpu"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_host_cost_of_a_call_is_small():
    call = xla_call()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(20):
            torch_rpa.ragged_paged_attention(*call, sm_scale=0.1, sliding_window=6)
        times.append((time.perf_counter() - start) / 20)
        torch_xla.sync(wait=True)
    # 60 to 90 us on two idle cores, several times that on busy ones.
    assert min(times[1:]) < 600e-6


# ---- errors and devices


def test_static_errors_are_raised_at_the_call():
    call = xla_call()
    with pytest.raises(ValueError, match="kv_lens must be int32"):
        ops.ragged_paged_attention(*call._replace(kv_lens=call.kv_lens.long()))
    with pytest.raises(ValueError, match="v must be on the device of q, xla:0, got"):
        ops.ragged_paged_attention(*call._replace(v=make_call().v))


def test_values_are_checked_on_request(monkeypatch):
    call = xla_call()
    call.kv_lens[0] = 1000
    with pytest.raises(ValueError, match=r"kv_lens\[0\] must be in"):
        torch_rpa.ragged_paged_attention(*call, validate=True)
    monkeypatch.setenv(validation.VALIDATE_ENV, "1")
    with pytest.raises(ValueError, match=r"kv_lens\[0\] must be in"):
        ops.ragged_paged_attention(*call)
    torch_xla.sync()


def test_asking_for_a_gradient_is_an_error():
    call = xla_call()
    call.q.requires_grad_()
    for operator in (ops.ragged_paged_attention, ops.ragged_paged_attention_functional):
        with pytest.raises(NotImplementedError, match="no backward"):
            operator(*call)

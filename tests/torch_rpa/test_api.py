"""The public function: choice of implementation, and the simulated kernel."""

from typing import Any

import pytest
import torch

import torch_rpa
from jax_kernels.contract import AttentionOptions
from tests.support import interpret
from tests.torch_rpa.calls import (
    assert_matches_oracle,
    from_batch,
    make_call,
    raw_bytes,
    to_device,
)
from tests.torch_rpa.scenarios import make_scenario
from torch_rpa import reference
from torch_rpa.bridges import interpret as interpret_bridge
from torch_rpa.validation import Inputs


def test_the_result_and_the_cache_are_those_of_the_operator():
    call, expected_call = make_call(sinks=True), make_call(sinks=True)
    options: dict[str, Any] = {"sm_scale": 0.1, "soft_cap": 5.0, "k_scale": 2.0}
    out = torch_rpa.ragged_paged_attention(*call, **options)
    expected = torch.ops.rpa.ragged_paged_attention(*expected_call, **options)
    assert torch.equal(out, expected)
    assert torch.equal(raw_bytes(call.kv_cache), raw_bytes(expected_call.kv_cache))


def test_an_unknown_implementation_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"impl must be one of .*'reference'.*'flash'"):
        torch_rpa.ragged_paged_attention(*make_call(), impl="flash")


def test_no_implementation_but_the_operator_differentiates_either():
    call = make_call()
    call.q.requires_grad_()
    for impl in (None, "reference", "pallas_interpret"):
        with pytest.raises(NotImplementedError, match="no backward"):
            torch_rpa.ragged_paged_attention(*call, impl=impl)


def test_reference_on_cpu_tensors_goes_sequence_by_sequence():
    call, expected_call = make_call(), make_call()
    out = torch_rpa.ragged_paged_attention(*call, impl="reference")
    options = AttentionOptions()
    expected: Any = reference.ragged_paged_attention_(Inputs(*expected_call), options)
    assert torch.equal(out, expected)


def test_pallas_interpret_wants_cpu_tensors():
    call = to_device(make_call(), "meta")
    with pytest.raises(NotImplementedError, match=r"CPU tensors, got meta.*\.cpu\(\)"):
        torch_rpa.ragged_paged_attention(*call, impl="pallas_interpret")


def test_the_simulated_kernel_takes_tensors_of_any_strides():
    columns = torch.arange(6.0).reshape(2, 3)
    for tensor in (columns[:, 1], columns[:1, 1], columns[0, :1].expand(2), columns.T):
        array = interpret_bridge._to_numpy(tensor)
        assert array.tolist() == tensor.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "fp8 scales", "read only"])
def test_pallas_interpret_runs_the_kernel_in_place_and_compiles_it_once(name):
    batch, options, oracle_options = make_scenario(name)
    misses = interpret_bridge._compiled.cache_info().misses
    for _ in range(2):
        call = from_batch(batch)
        address = call.kv_cache.data_ptr()
        with interpret.checked_interpret_mode():
            out = torch_rpa.ragged_paged_attention(
                *call, **options, impl="pallas_interpret"
            )
        assert call.kv_cache.data_ptr() == address
        assert_matches_oracle(out, call, batch, **oracle_options)
    assert interpret_bridge._compiled.cache_info().misses == misses + 1


@pytest.mark.parametrize("impl", [None, "reference", "pallas_interpret"])
def test_values_are_checked_for_every_implementation(monkeypatch, impl):
    call = make_call()
    call.distribution[:] = torch.tensor([3, 3, 4])  # the third has nine tokens
    with pytest.raises(ValueError, match="distribution puts sequence 2"):
        torch_rpa.ragged_paged_attention(*call, impl=impl, validate=True)
    monkeypatch.setenv("TORCH_RPA_VALIDATE", "1")
    with pytest.raises(ValueError, match="distribution puts sequence 2"):
        torch_rpa.ragged_paged_attention(*call, impl=impl)

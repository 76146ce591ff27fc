"""How the one launch is put together: by the fields of its named tuples."""

from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_kernels.ragged_paged_attention import kv_cache_shape, ragged_paged_attention
from jax_kernels.ragged_paged_attention.kernel import launch, refs

SCALARS = refs.ScalarRefs("lengths", "pages", "starts", "counts")


class MoreOutputs(NamedTuple):
    """What a later feature might return."""

    out: refs.InHbm
    kv_cache: refs.InHbm
    sums: refs.InSmem


def test_a_field_says_in_which_memory_its_array_is():
    assert refs.memory_spaces(refs.Inputs) == {
        "queries": pl.ANY,
        "keys": pl.ANY,
        "values": pl.ANY,
        "kv_cache": pl.ANY,
        "sinks": pltpu.SMEM,
        "head_factors": pltpu.SMEM,
    }
    specs = launch.block_specs(MoreOutputs("out", None, "sums"))
    assert [spec.memory_space for spec in specs] == [pl.ANY, pltpu.SMEM]


@pytest.mark.parametrize(
    "inputs, outputs, expected",
    [
        (("q", "k", "v", "cache", "sinks"), refs.Outputs("out", None, "cache"), {7: 1}),
        (("q", "k", "v", "cache", None), refs.Outputs("out", None, "cache"), {7: 1}),
        (("q", None, None, "cache", "sinks"), refs.Outputs("out", "lse", None), {}),
        (("q", "k", "v", "cache", None), MoreOutputs("out", None, "sums"), {}),
        (("q", "k", "v", "cache", None), MoreOutputs(None, "cache", "sums"), {7: 0}),
    ],
)
def test_an_output_is_the_memory_of_the_input_of_its_name(inputs, outputs, expected):
    """Positions count what is there; the four scalars come first."""
    assert launch.aliases(SCALARS, refs.Inputs(*inputs), outputs) == expected


def compiler_params() -> pltpu.CompilerParams:
    """What a traced call hands to the compiler."""
    cache = jax.ShapeDtypeStruct(
        kv_cache_shape(4, 16, 2, 64, "bfloat16"), jnp.dtype("bfloat16")
    )
    tokens = jax.ShapeDtypeStruct((8, 2, 64), jnp.dtype("bfloat16"))
    integers = (jax.ShapeDtypeStruct((n,), jnp.dtype("int32")) for n in (2, 8, 3, 3))
    # A new function each time: JAX keeps what it has traced.
    with mock.patch.object(pl, "pallas_call", side_effect=pl.pallas_call) as spy:
        jax.eval_shape(
            lambda *arrays: ragged_paged_attention(*arrays),
            *(tokens, tokens, tokens, cache, *integers),
        )
    return spy.call_args.kwargs["compiler_params"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "value, expected", [(None, False), ("", False), ("0", False), ("1", True)]
)
def test_bounds_are_checked_on_request(value, expected, monkeypatch):
    monkeypatch.delenv("RPA_BOUNDS_CHECKS", raising=False)
    if value is not None:
        monkeypatch.setenv("RPA_BOUNDS_CHECKS", value)
    assert compiler_params().disable_bounds_checks is not expected


def test_other_values_of_the_switch_are_refused(monkeypatch):
    monkeypatch.setenv("RPA_BOUNDS_CHECKS", "yes")
    with pytest.raises(ValueError, match="RPA_BOUNDS_CHECKS: expected 0 or 1, got"):
        compiler_params()

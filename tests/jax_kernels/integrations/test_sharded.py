"""One call on the devices of a mesh, compared with one call on one device."""

import functools
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_kernels import ragged_paged_attention as rpa
from jax_kernels.integrations.tpu_inference import cache_shape, sharded
from tests.support.ragged_batches import make_ragged_batch

SEQUENCES = [(1, 20), (1, 9), (3, 3), (9, 25)]
AXES = sharded.Axes("data", "model")
PLAIN = {
    "sm_scale": 0.1,
    "causal": True,
    "sliding_window": None,
    "soft_cap": None,
    "q_scale": None,
    "k_scale": None,
    "v_scale": None,
    "update_kv_cache": True,
    "decode_query_size": 1,
}


def one_device(**axes):
    names = ("data", "model", *axes)
    devices = np.array(jax.devices()[:1]).reshape([1] * len(names))
    return Mesh(devices, names)


def attend(arrays, **options):
    """Calls it with the arrays of a batch, the cache in the engine's shape and back."""
    q, k, v, cache, *metadata, sinks = arrays
    num_pages, heads, rows, packing, lanes = cache.shape
    shape = cache_shape.engine_shape(
        num_pages, rows * packing, k.shape[1], q.shape[-1], cache.dtype.name
    )
    options = {"mesh": one_device(), "axes": AXES, **PLAIN, **options}
    run = jax.jit(functools.partial(sharded.attend, **options))
    step = sharded.Step(*metadata)
    out, cache = run(q, k, v, cache.reshape(shape), step, sinks)
    return out, cache.reshape(num_pages, heads, rows, packing, lanes)


def assert_same(results, expected):
    for got, wanted in zip(results, expected, strict=True):
        if got.dtype.itemsize == 1:
            got, wanted = (np.asarray(x).view("u1") for x in (got, wanted))
            np.testing.assert_array_equal(got, wanted)
        else:
            got, wanted = (np.asarray(x, "f4") for x in (got, wanted))
            np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "cache_dtype", "options"),
    [
        (128, "float32", {}),
        (64, "bfloat16", {"sliding_window": 7}),
        (96, "bfloat16", {"soft_cap": 5.0, "causal": False}),
    ],
)
def test_it_is_the_call_of_one_device(head_dim, cache_dtype, options):
    batch = make_ragged_batch(
        SEQUENCES, head_dim=head_dim, cache_dtype=cache_dtype, with_sinks=True
    )
    expected = rpa.ragged_paged_attention_reference(
        *batch.jax_arguments, sm_scale=0.1, **options
    )
    assert_same(attend(batch.jax_arguments, **options), expected)


def test_keys_and_values_that_come_quantised_are_those_that_the_kernel_quantises():
    scales = {"k_scale": 0.03, "v_scale": 0.05}
    batch = make_ragged_batch(SEQUENCES, cache_dtype="float8_e4m3fn")
    expected = rpa.ragged_paged_attention_reference(
        *batch.jax_arguments, sm_scale=0.1, **scales
    )
    q, k, v, *rest = batch.jax_arguments
    k, v = (
        jnp.clip(x * (1 / scale), -448, 448).astype("float8_e4m3fn")
        for x, scale in zip((k, v), scales.values(), strict=True)
    )
    assert_same(attend((q, k, v, *rest), **scales), expected)


def test_heads_below_64_are_padded():
    batch = make_ragged_batch(SEQUENCES, head_dim=128)
    narrow = make_ragged_batch(SEQUENCES, head_dim=32)
    q, k, v = narrow.jax_arguments[:3]
    cache = jnp.zeros(batch.kv_cache.shape, batch.kv_cache.dtype)
    metadata: tuple = narrow.jax_arguments[4:8]
    wide: list = [jnp.pad(x, [(0, 0), (0, 0), (0, 96)]) for x in (q, k, v)]
    arguments: tuple = (*wide, cache, *metadata)
    expected, expected_cache = rpa.ragged_paged_attention_reference(
        *arguments, sm_scale=0.1
    )
    results = attend((q, k, v, cache, *metadata, None))
    assert_same(results, (expected[..., :32], expected_cache))


def test_nothing_is_written_for_layers_that_share_a_cache():
    batch = make_ragged_batch(SEQUENCES, cache_holds_new_tokens=True)
    arrays = batch.jax_arguments
    expected = rpa.ragged_paged_attention_reference(
        *arrays, sm_scale=0.1, update_kv_cache=False
    )
    q, k, _, *rest = arrays
    zeros = jnp.zeros_like(k, dtype="bfloat16")
    assert_same(attend((q, zeros, zeros, *rest), update_kv_cache=False), expected)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, (1, [2, 2, 4])), (4, (4, [2, 2, 4])), (17, (1, [0, 0, 4]))],
)
def test_several_queries_of_a_decode_go_to_the_decode_loop(monkeypatch, size, expected):
    seen = []

    def kernel(q, k, v, cache, *metadata, decode_q_len, **options):
        seen.append((decode_q_len, metadata[3]))
        return q, cache

    monkeypatch.setattr(rpa, "ragged_paged_attention_reference", kernel)
    batch = make_ragged_batch(SEQUENCES, distribution=(2, 2, 4))
    q, k, v, cache, *metadata, sinks = batch.jax_arguments
    sharded._attend_on_device(
        q,
        k,
        v,
        cache[:, None],
        sharded.Step(*metadata),
        sinks,
        v_scale=None,
        decode_query_size=size,
        chip=None,
        interpret=False,
        update_kv_cache=True,
    )
    ((decode_q_len, distribution),) = seen
    assert (decode_q_len, distribution.tolist()) == expected


@pytest.mark.parametrize("axis", ["dcp", "pcp"])
def test_a_mesh_that_splits_sequences_is_refused(axis):
    mesh = types.SimpleNamespace(shape={"data": 1, "model": 1, axis: 2})
    batch = make_ragged_batch(SEQUENCES)
    with pytest.raises(NotImplementedError, match=f"got {axis}=2"):
        attend(batch.jax_arguments, mesh=mesh)


def test_heads_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ValueError, match=r"must divide the 4 devices .* got 3"):
        k = jnp.zeros((5, 3, 64))
        sharded._with_heads_for_all(k, k, 4)


@pytest.mark.slow
@pytest.mark.extended
def test_several_devices_give_what_one_gives():
    child = subprocess.run(
        [sys.executable, "-m", "tests.jax_kernels.integrations.mesh_cases"],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines() == ["heads", "repeated heads", "data", "experts"]

"""Mistakes that frameworks would take or refuse in their own way: one error for all."""

from typing import Any

import numpy as np
import pytest
import torch

import jax_kernels.ragged_paged_attention as rpa
import torch_rpa
from tests.torch_rpa.calls import make_call

jnp = pytest.importorskip("jax.numpy")

MISTAKES = [
    ("k_scale", True),
    ("k_scale", "1"),
    ("k_scale", np.float32(0.3)),
    ("sm_scale", 10**400),
    ("sliding_window", True),
    ("sliding_window", 2.0),
    ("sliding_window", 2**63),
    ("causal_block", 8.0),
    ("chunk_prefill_size", np.int64(2)),
    ("decode_q_len", 17),
    ("decode_q_len", None),
    ("causal", 1),
    ("update_kv_cache", 0),
    ("probabilities_dtype", "nonsense"),
    ("out_dtype", "nonsense"),
    ("block_sizes", "abc"),
]
TENSORS = ("q", "kv_cache", "kv_lens", "page_indices", "cu_q_lens", "distribution")


def in_jax(call: tuple) -> list[Any]:
    return [
        None if t is None else jnp.zeros(tuple(t.shape), str(t.dtype)[6:]) for t in call
    ]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("name", "value"), MISTAKES, ids=str)
def test_an_option_of_another_type_is_the_same_error_in_torch_and_jax(
    device, name, value
):
    options: dict[str, Any] = {name: value}
    call = make_call()
    before = call.kv_cache.clone()
    moved: list[Any] = [None if t is None else t.to(device) for t in call]
    with pytest.raises(ValueError, match=f"^{name} must be .* got ") as ours:
        torch_rpa.ragged_paged_attention(*moved, **options)
    with pytest.raises(ValueError, match=f"^{name} must be .* got ") as theirs:
        rpa.ragged_paged_attention(*in_jax(call), **options, interpret=True)
    # Dtypes are of the framework's own types, and so are block sizes.
    if name not in ("probabilities_dtype", "out_dtype", "block_sizes"):
        assert str(ours.value) == str(theirs.value)
    assert torch.equal(call.kv_cache, before)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_is_missing_is_named(device, name):
    call = make_call()
    call = call._make(None if t is None else t.to(device) for t in call)
    call = call._replace(**{name: None})
    message = f"^{name} must be given, got None$"
    with pytest.raises(ValueError, match=message):
        torch.ops.rpa.ragged_paged_attention(*call)
    with pytest.raises(ValueError, match=message):
        rpa.ragged_paged_attention_reference(*in_jax(call))

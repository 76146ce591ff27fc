"""The same call means the same on CPU tensors, on the XLA CPU device and in the kernel.

What is stored is compared in every byte, over scales that are no powers of two.
"""

from typing import Any

import numpy as np
import pytest
import torch

torch_xla = pytest.importorskip("torch_xla")

import jax_kernels.ragged_paged_attention as rpa  # noqa: E402
from tests.support import oracle  # noqa: E402
from tests.torch_rpa.calls import make_call, raw_bytes, to_device  # noqa: E402
from torch_rpa import ops, reference  # noqa: E402
from torch_rpa.bridges import interpret, lowering  # noqa: E402
from torch_rpa.options import make_options, split_tensors  # noqa: E402
from torch_rpa.validation import Inputs  # noqa: E402

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}
SCALES = (0.3, 1 / 3, 0.07, 3.7, 0.011, 123.4)
# A case for each dtype, and one more for each chip that rounds to e4m3 by itself.
KERNEL_CASES = [
    ("bfloat16", "v5e"),
    ("float32", "v6e"),
    ("float8_e4m3fn", "v5e"),
    ("float8_e4m3fn", "v6e"),
    ("float8_e4m3fn", "tpu7x"),
    ("float8_e5m2", "v6e"),
    ("int8", "tpu7x"),
]


def numbers(*shape: int) -> torch.Tensor:
    """Numbers many of which are halfway between two that can be stored.

    Quarters times a scale are such, as 8.25 / 0.3 = 27.5 is for int8.
    """
    generator = torch.Generator().manual_seed(0)
    quarters = torch.randint(-400, 400, shape, generator=generator) / 4
    others = torch.randn(shape, generator=generator) * 60
    is_quarter = torch.rand(shape, generator=generator) < 0.5
    return torch.where(is_quarter, quarters, others)


def make_wide_call(cache_dtype: str) -> Inputs:
    call = make_call(
        [(1, 13), (1, 8), (15, 20)],
        head_dim=32,
        num_q_heads=2,
        num_kv_heads=2,
        cache_dtype=DTYPES[cache_dtype],
    )
    k, v = numbers(2, *call.k.shape) if call.k is not None else (None, None)
    return Inputs(*call._replace(k=k, v=v))


def run_torch(call: Inputs, options: dict[str, Any]) -> torch.Tensor:
    return ops.ragged_paged_attention(*call, **options)


def run_xla(call: Inputs, options: dict[str, Any]) -> torch.Tensor:
    moved = to_device(call, torch_xla.device())
    out = ops.ragged_paged_attention(*moved, **options)
    torch_xla.sync()
    call.kv_cache.copy_(moved.kv_cache.cpu())
    return out.cpu()


def run_jax(call: Inputs, options: dict[str, Any]) -> torch.Tensor:
    jnp = lowering.import_jax().numpy
    arrays: list[Any] = [None if t is None else jnp.asarray(array_of(t)) for t in call]
    function = lowering.with_array_options(
        rpa.ragged_paged_attention_reference, options
    )
    out, kv_cache = function(*arrays)
    stored = torch.from_numpy(np.array(kv_cache).view(np.uint8))
    call.kv_cache.copy_(stored.view(call.kv_cache.dtype))
    return torch.from_numpy(np.array(out))


PATHS = {"torch": run_torch, "xla": run_xla, "jax": run_jax}


def array_of(tensor: torch.Tensor) -> np.ndarray:
    data = raw_bytes(tensor.reshape(-1)).numpy()
    return data.view(lowering.jax_dtype(tensor.dtype)).reshape(tensor.shape)


def expected_bytes(call: Inputs, **scales: Any) -> np.ndarray:
    """The whole cache as numpy computes it, in bytes."""
    _, k, v, *rest = (None if t is None else array_of(t) for t in call[:8])
    cache = oracle.expected_cache(k, v, *rest, head_dim=call.q.shape[2], **scales)
    return cache.view(np.uint8)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", DTYPES)
def test_a_stored_number_is_a_product_with_the_inverse_scale(name, scale):
    values = numbers(20_480)
    stored = reference.encode(values, DTYPES[name], scale)
    expected = oracle.store(values.numpy(), lowering.jax_dtype(DTYPES[name]), scale)
    np.testing.assert_array_equal(raw_bytes(stored).numpy(), expected.view(np.uint8))


def test_the_smallest_case_is_stored_as_28():
    """In float32, 8.25 * (1 / 0.3) is 27.5, a tie, and 8.25 / 0.3 is 27.499998."""
    stored = reference.encode(torch.tensor([8.25]), torch.int8, 0.3)
    assert stored.item() == 28
    assert np.float32(8.25) / np.float32(0.3) < 27.5


@pytest.mark.parametrize("scales", [(0.3, 1 / 3), (3.7, 0.07)])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", DTYPES)
def test_every_path_stores_the_same_bytes(name, path, scales):
    call = make_wide_call(name)
    options = {"k_scale": scales[0], "v_scale": scales[1]}
    expected = expected_bytes(call, **options)
    PATHS[path](call, options)
    np.testing.assert_array_equal(raw_bytes(call.kv_cache).numpy(), expected)


# Two heads, numbers of which the inverse is rounded up, down or not at all.
SCALES_OF_HEADS = {
    "k_scale": torch.tensor([0.3, 7.0]),
    "v_scale": torch.tensor([123.4, 0.25]),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", DTYPES)
def test_every_path_stores_the_same_bytes_by_scales_of_heads(name, path):
    call = make_wide_call(name)
    tensors, _ = split_tensors(SCALES_OF_HEADS)
    scales = {name: scale.numpy() for name, scale in SCALES_OF_HEADS.items()}
    expected = expected_bytes(call, **scales)
    PATHS[path](call._replace(**tensors), {})
    np.testing.assert_array_equal(raw_bytes(call.kv_cache).numpy(), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_tensor_of_one_number_is_that_number(path, scale):
    """A number that float32 has."""
    call, expected_call = make_wide_call("int8"), make_wide_call("int8")
    tensor = torch.tensor(scale)
    number = {name: float(tensor) for name in ("q_scale", "k_scale", "v_scale")}
    tensors, _ = split_tensors(dict.fromkeys(number, tensor))
    options = {"sm_scale": 1e-3}
    expected = PATHS["torch"](expected_call, options | number)
    out = PATHS[path](call._replace(**tensors), options)
    torch.testing.assert_close(out, expected, atol=1e-4 * scale, rtol=1e-4)
    assert torch.equal(raw_bytes(call.kv_cache), raw_bytes(expected_call.kv_cache))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chip"), KERNEL_CASES)
def test_the_kernel_stores_the_same_bytes_on_every_chip(name, chip):
    call = make_wide_call(name)
    options = {"k_scale": 0.3, "v_scale": 1 / 3}
    expected = expected_bytes(call, **options)
    interpret.interpret_pallas_(call, make_options(options), chip)
    np.testing.assert_array_equal(raw_bytes(call.kv_cache).numpy(), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("int8", "tpu7x"),
        pytest.param("float8_e4m3fn", "v5e", marks=pytest.mark.extended),
        pytest.param("bfloat16", "v6e", marks=pytest.mark.extended),
    ],
)
def test_the_kernel_stores_the_same_bytes_by_scales_of_heads(name, chip):
    call = make_wide_call(name)
    tensors, _ = split_tensors(SCALES_OF_HEADS)
    scales = {name: scale.numpy() for name, scale in SCALES_OF_HEADS.items()}
    expected = expected_bytes(call, **scales)
    call = call._replace(**tensors)
    interpret.interpret_pallas_(call, make_options({}), chip)
    np.testing.assert_array_equal(raw_bytes(call.kv_cache).numpy(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "options",
    [
        {"sm_scale": 0.0},
        {"sm_scale": -0.2, "sliding_window": 5},
        {"sm_scale": -0.2, "soft_cap": 3.0},
        {"sm_scale": 0.1, "sliding_window": 2**40},
        {"sm_scale": 0.1, "sliding_window": 2**63 - 1, "causal": False},
        {"sm_scale": 0.1, "chunk_prefill_size": 2**40},
        {"sm_scale": 0.1, "decode_q_len": 16},
    ],
    ids=str,
)
def test_unusual_options_mean_the_same(path, options):
    call = make_wide_call("float32")
    arrays = [None if t is None else array_of(t) for t in call[:8]]
    only_speed = ("chunk_prefill_size", "decode_q_len")
    for_oracle = {k: v for k, v in options.items() if k not in only_speed}
    expected = oracle.ragged_paged_attention(*arrays, **for_oracle)
    out = PATHS[path](call, options)
    np.testing.assert_allclose(out.numpy(), expected.out, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"sm_scale": 0.0, "sliding_window": 2**40},  # wider than any context
        {"sm_scale": -0.2, "sliding_window": 5},
    ],
    ids=str,
)
def test_unusual_options_mean_the_same_in_the_kernel(options):
    call, expected_call = make_wide_call("float32"), make_wide_call("float32")
    expected = ops.ragged_paged_attention(*expected_call, **options)
    out = interpret.interpret_pallas_(call, make_options(options))
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_a_sink_of_infinity_takes_all_the_weight(path):
    call = make_wide_call("float32")
    sinks = torch.tensor([torch.inf, -torch.inf])
    expected = PATHS["torch"](make_wide_call("float32"), {"sm_scale": 0.1})
    out = PATHS[path](call._replace(sinks=sinks), {"sm_scale": 0.1})
    assert not out[:, 0].any()
    torch.testing.assert_close(out[:, 1], expected[:, 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("in_decode_range", [True, False])
def test_a_sequence_without_a_query_is_skipped(path, in_decode_range):
    lengths = [(1, 13), (0, 8), (1, 20)]
    call = make_call(lengths, head_dim=32, num_q_heads=2, num_kv_heads=2)
    ends = [3, 3, 3] if in_decode_range else [0, 0, 3]
    call = call._replace(distribution=torch.tensor(ends, dtype=torch.int32))
    before = call.kv_cache.clone()
    out = PATHS[path](Inputs(*call), {"sm_scale": 0.1})
    assert not out[2:].any()
    page = call.page_indices.view(5, 4)[1, 0]
    assert torch.equal(raw_bytes(call.kv_cache[page]), raw_bytes(before[page]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"k": None, "v": None}, {}, ValueError, "k and v must be given"),
        (
            {"v": None},
            {"update_kv_cache": False},
            ValueError,
            "v must be given",
        ),
        ({}, {"update_kv_cache": None}, ValueError, "update_kv_cache must be True or"),
        ({}, {"causal": None}, ValueError, "causal must be True or False"),
        ({}, {"sm_scale": None}, ValueError, "sm_scale must be a Python number"),
        ({}, {"k_scale": 1e-45}, ValueError, "k_scale must be a positive"),
        ({}, {"v_scale": 1e300}, ValueError, "v_scale must be a positive"),
        ({}, {"q_scale": 0.5}, NotImplementedError, "q_scale is not supported with"),
        (
            {"q": torch.zeros(24, 2, 600)},
            {},
            NotImplementedError,
            "head_dim 600 is",
        ),
        ({"q": torch.zeros(24, 2, 96)}, {}, ValueError, "k must have shape"),
        (
            {"q": torch.zeros(24, 2, 32, dtype=torch.float16)},
            {},
            NotImplementedError,
            "q of float16 is not supported",
        ),
        (
            {"kv_cache": torch.zeros(32, 6, 8, 1, 128)},
            {},
            ValueError,
            "kv_cache of float32 must be made for 2 key heads of head_dim 32",
        ),
        (
            {"kv_cache": torch.zeros(32, 2, 8, 1, 128, dtype=torch.float16)},
            {},
            NotImplementedError,
            "kv_cache of float16 is not supported",
        ),
    ],
)
def test_the_same_mistake_is_the_same_error(path, changes, options, error, message):
    call = make_wide_call("float32")._replace(**changes)
    with pytest.raises(error, match=message):
        PATHS[path](call, options)


@pytest.mark.parametrize("path", PATHS)
def test_another_output_dtype_is_the_same_error(path):
    out_dtype: Any = torch.float16 if path != "jax" else np.float16
    with pytest.raises(NotImplementedError, match="out_dtype float16 is not supported"):
        PATHS[path](make_wide_call("float32"), {"out_dtype": out_dtype})

"""A small set that every supported release of JAX passes: `.ci/jax_versions` runs it.

It has every phase, the dtypes of a cache that are handled apart, the options that have
code of their own, and one program for each chip. Other modules belong to it as well:
those marked ``versions``. All of it runs without PyTorch. Where PyTorch is installed,
the other tests of the kernel run, which look at more.
"""

import functools
import importlib.metadata
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_kernels import ragged_paged_attention as rpa
from jax_kernels.ragged_paged_attention import jax_versions
from tests.conftest import HAS_TPU
from tests.support import interpret, tpu_compile
from tests.support.ragged_batches import make_ragged_batch

pytestmark = [
    pytest.mark.versions,
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is not None,
        reason="for environments without PyTorch: see .ci/jax_versions",
    ),
]

BFLOAT16, E4M3FN = "bfloat16", "float8_e4m3fn"
# (q_len, kv_len): two that decode, two chunks of 8, a prompt, and one that goes on.
LENGTHS = ((1, 1), (1, 40), (8, 8), (8, 21), (5, 5), (20, 45))
# Most of the time goes to compiling a simulation for each, by the number of phases.
CASES = {
    "bfloat16_with_chunks": ({"head_dim": 128}, {"chunk_prefill_size": 8}),
    "window_cap_sinks": (
        {"cache_dtype": E4M3FN, "with_sinks": True, "k_scale": 0.5},
        {"sliding_window": 18, "soft_cap": 5.0, "k_scale": 0.5},
    ),
    "e4m3fn_of_v5e": ({"cache_dtype": E4M3FN, "head_dim": 128}, {"chip": "v5e"}),
    "e4m3fn_of_v6e": ({"cache_dtype": E4M3FN}, {"chip": "v6e"}),
    "int8_with_int8_queries": (
        {"cache_dtype": "int8", "k_scale": 0.03, "v_scale": 0.025},
        {"q_scale": 0.03, "k_scale": 0.03, "v_scale": 0.025},
    ),
    "float32_read_only": (
        {"q_dtype": "float32", "cache_holds_new_tokens": True},
        {"update_kv_cache": False, "causal": False, "copies": "eager"},
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(HAS_TPU, reason="in interpret mode, for chips that are not there")
@pytest.mark.parametrize("name", CASES)
def test_every_phase_matches_float64_and_has_no_race(name):
    """The output within its error budget, the whole cache byte for byte."""
    sizes, options = CASES[name]
    has_chunks = "chunk_prefill_size" in options
    batch = make_ragged_batch(
        LENGTHS,
        distribution=(2, 4 if has_chunks else 2, 6),
        **{"q_dtype": BFLOAT16} | sizes,
    )
    interpret.assert_kernel_matches_oracle(batch, sm_scale=0.1, **options)


def arguments() -> list[jax.ShapeDtypeStruct]:
    shapes = ((16, 8, 128), (16, 2, 128), (16, 2, 128))
    cache = rpa.kv_cache_shape(64, 16, 2, 128, BFLOAT16)
    arrays = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in (*shapes, cache)]
    numbers = ((4,), (32,), (5,), (3,))
    return arrays + [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in numbers]


@pytest.mark.parametrize("chip", ["v5p", "TPU v6 lite", "tpu7x"])
def test_a_named_chip_is_all_that_lowering_without_a_tpu_needs(chip):
    attend = functools.partial(rpa.ragged_paged_attention, sm_scale=0.1, chip=chip)
    lowered = jax.jit(attend).trace(*arguments()).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 1


def knows(chip: str) -> bool:
    """Whether the installed libtpu compiles for a chip."""
    release = importlib.metadata.version("libtpu").split(".")
    return chip != "tpu7x" or tuple(map(int, release[:3])) >= (0, 0, 42)


@pytest.mark.slow
@pytest.mark.skipif(HAS_TPU, reason="compiles for chips that are not there")
@pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="needs libtpu, which compiles"
)
@pytest.mark.parametrize(
    ("chip", "cache_dtype"), [("v5e", E4M3FN), ("v6e", BFLOAT16), ("tpu7x", E4M3FN)]
)
def test_decode_and_mixed_compile_and_update_the_cache_in_place(chip, cache_dtype):
    if not knows(chip):
        pytest.skip(f"libtpu {importlib.metadata.version('libtpu')} has no {chip}")
    shapes = tpu_compile.Shapes(8, 1, 128, cache_dtype=cache_dtype, with_sinks=True)
    compiled = tpu_compile.compile_kernel(shapes, chip, sliding_window=1000)
    assert compiled.alias_bytes == shapes.cache_bytes
    for operation in compiled.operations:
        if shapes.cache_hlo_type in operation.result_type:
            assert operation.name != "copy", operation.text


asks_for_a_device = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="this JAX asks for no device"
)


def named_device(mesh) -> str | None:
    """What the lowering is told of the device within a mesh of the caller."""
    with jax.sharding.use_abstract_mesh(mesh):
        with jax_versions.device_named("TPU7x"):
            inner = jax.sharding.get_abstract_mesh()
        assert inner.shape == mesh.shape
        assert jax.sharding.get_abstract_mesh() == mesh
    return inner.abstract_device.device_kind


@asks_for_a_device
def test_a_mesh_keeps_its_axes_and_the_tpu_that_it_names():
    def mesh(device_kind: str, platform: str):
        device = jax.sharding.AbstractDevice(
            device_kind=device_kind, num_cores=1, platform=platform
        )
        return jax.sharding.AbstractMesh((2,), ("x",), abstract_device=device)

    assert named_device(jax.sharding.AbstractMesh((), ())) == "TPU7x"
    assert named_device(jax.sharding.AbstractMesh((2,), ("x",))) == "TPU7x"
    assert named_device(mesh("cpu", "cpu")) == "TPU7x"
    assert named_device(mesh("TPU v6 lite", "tpu")) == "TPU v6 lite"


@asks_for_a_device
def test_without_a_chip_nothing_is_named():
    before = jax.sharding.get_abstract_mesh()
    with jax_versions.device_named(None):
        assert jax.sharding.get_abstract_mesh() == before


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 7, 2), reason="this JAX needs no other byte code"
)
def test_byte_code_is_that_of_the_old_libtpu_only_within():
    from jax._src import cloud_tpu_init, tpu_custom_call

    before = tpu_custom_call.get_ir_version, cloud_tpu_init.running_in_cloud_tpu_vm
    with jax_versions.byte_code_for_libtpu():
        version: Any = tpu_custom_call.get_ir_version
        assert version(None) == 7
        assert not cloud_tpu_init.running_in_cloud_tpu_vm
    after = tpu_custom_call.get_ir_version, cloud_tpu_init.running_in_cloud_tpu_vm
    assert after == before

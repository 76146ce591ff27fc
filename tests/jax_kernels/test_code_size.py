"""The loops of the kernel fit the instruction memory of every chip.

Compiles each shape with libtpu and measures its loops in the final listing. All limits
are in tests/support/code_size.py. ``test_tpu_compile.py`` looks at its many programs as
a whole, so this is left to a longer run.
"""

from typing import Any

import pytest

from tests.conftest import HAS_TPU

pytest.importorskip("libtpu", reason="needs libtpu, which compiles without a TPU")
if HAS_TPU:
    pytest.skip("libtpu may be held by the TPU's own process", allow_module_level=True)

from benchmarks import cases, compiler
from benchmarks.tpu_timing import code_size
from jax_kernels import chips
from tests.support.code_size import HOT_LOOP, LARGEST_LOOP, LONGER, TOO_LONG

FLOAT32 = {"q_dtype": "float32", "cache_dtype": "float32"}
FLOAT8 = {"cache_dtype": "float8_e4m3fn"}
# Model and dtypes.
SHAPES: dict[str, tuple[cases.Model, dict[str, Any]]] = {
    "32/8": (cases.LLAMA3_8B, {}),
    "32/8 fp8": (cases.LLAMA3_8B, FLOAT8),
    "32/8 f32": (cases.LLAMA3_8B, FLOAT32),
    "32/8 window": (cases.Model(32, 8, 128, sliding_window=1024), {}),
    "32/8 of 256": (cases.WIDE, {}),
    "32/4 of 256": (cases.GROUPED_256, {}),
    "32/4 of 512": (cases.GEMMA4_FULL, {}),
    "32/4 of 512 f32": (cases.GEMMA4_FULL, FLOAT32),
    "32/4 of 512 fp8": (cases.GEMMA4_FULL, FLOAT8),
    "8/4 of 256": (cases.GEMMA, {}),
    "64/8": (cases.Model(64, 8, 128), {}),
    "64/8 of 64": (cases.GPT_OSS, {}),
    "8/1": (cases.LLAMA3_70B_SHARD, {}),
    "8/1 fp8": (cases.LLAMA3_70B_SHARD, FLOAT8),
    "8/1 of 64": (cases.GPT_OSS_SHARD_FULL, {}),
    "32/32 of 96": (cases.Model(32, 32, 96), {}),
    "32/32 of 96 fp8": (cases.Model(32, 32, 96), FLOAT8),
    "16/1": (cases.QWEN3_235B_SHARD, {}),
}


def shape_of(name: str) -> cases.StaticShape:
    """Enough of everything for full block sizes."""
    model, dtypes = SHAPES[name]
    return cases.StaticShape(
        model, num_tokens=2048, num_sequences=64, pages_per_sequence=64, **dtypes
    )


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.parametrize("chip", chips.COMPILED)
@pytest.mark.parametrize("name", SHAPES)
def test_loops_fit_instruction_memory(name, chip):
    program = compiler.compile_program(shape_of(name), chip)
    longest = code_size.loop_sizes(program)[0]
    if (name, chip) in TOO_LONG:
        pytest.xfail(TOO_LONG[name, chip])
    limit = LARGEST_LOOP if name in LONGER else HOT_LOOP
    assert longest.bundles <= limit, (
        f"{name} on {chip}: {longest}, expected at most {limit} bundles; if more is "
        "worth it, say why in LONGER of tests/support/code_size.py"
    )


def test_exceptions_name_shapes_and_say_why():
    assert set(LONGER) | {name for name, _ in TOO_LONG} <= set(SHAPES)
    assert {chip for _, chip in TOO_LONG} <= set(chips.COMPILED)
    assert all(LONGER.values()) and all(TOO_LONG.values())

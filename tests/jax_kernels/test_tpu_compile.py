"""The TPU compiler takes the kernel, and puts nothing around it.

Real compiles for real chips, no TPU needed. Block sizes are the defaults, for models at
shapes for which these are at their largest. Of the compiled program it is asked that

* the cache is one buffer, in and out, and nothing but the kernel touches it;
* queries, keys, values and output are bitcasts of what the caller has: no transpose,
  no pad, no copy, no memory beside arguments and results.

Some shapes cannot have the second, and each test that allows something says what.
"""

import dataclasses
import itertools
import math
import re

import pytest

from tests.conftest import HAS_TPU

pytest.importorskip("libtpu", reason="needs libtpu, which compiles without a TPU")
if HAS_TPU:
    pytest.skip(
        "the kernel tests compile for the TPU there is", allow_module_level=True
    )

import jax.numpy as jnp

from jax_kernels import chips
from jax_kernels.ragged_paged_attention.token_layout import HeadRows, TokenRows
from tests.support.code_size import most_bundles, most_code
from tests.support.optimised_hlo import Operation
from tests.support.tpu_compile import (
    CompiledKernel,
    Shapes,
    compile_kernel,
    view_operations,
)

# Free: other names for the same bytes, and the parts of the kernel's result.
VIEWS = {"bitcast", "get-tuple-element", "tuple"}
# XLA may bring a small array into VMEM before the kernel asks for it, in one piece or
# in slices that are put side by side.
PREFETCH = {"copy-start", "copy-done", "slice-start", "slice-done", "ConcatBitcast"}
KERNEL = "tpu_custom_call"

MODELS = {
    "llama3_8b": Shapes(32, 8, 128),
    "qwen": Shapes(16, 8, 128),
    "gemma": Shapes(8, 4, 256),
    "gpt_oss": Shapes(64, 8, 64, with_sinks=True),
    "phi3": Shapes(32, 32, 96),
    "mqa": Shapes(8, 1, 128),
}
MODEL_OPTIONS = {"gpt_oss": {"sliding_window": 128}}


def allowed_around(shapes: Shapes) -> set[str]:
    """Operations on queries, keys, values or output that a shape cannot do without.

    Empty for most. The kernel wants the heads of one 32-bit word in a tile of their
    own, and a bf16 array comes in tiles of up to eight heads and 128 lanes.
    """
    allowed = set()
    if shapes.head_dim > 128 and shapes.head_dim % 128:
        # Only whole registers can be moved of a row longer than one.
        allowed |= {"pad", "constant"}
    if shapes.q_dtype == "bfloat16":
        even_heads = {shapes.num_q_heads, shapes.num_kv_heads}
        if shapes.num_q_heads % 2:
            # An odd query head has no partner in its word, and gets one of zeros.
            allowed |= {"pad", "constant", "slice", "copy", "fusion"}
        if shapes.num_kv_heads % 2:
            # Two tokens of an odd key head share a word.
            even_heads -= {shapes.num_kv_heads}
        if any(number % 8 and number not in (2, 4) for number in even_heads):
            # Tiles of eight heads are padded, tiles of two are not.
            allowed |= {"copy"}
    return allowed


def assert_cache_is_one_buffer(compiled: CompiledKernel, shapes: Shapes) -> None:
    assert compiled.alias_bytes == shapes.cache_bytes
    assert_cache_is_not_copied(compiled, shapes)


def assert_cache_is_not_copied(compiled: CompiledKernel, shapes: Shapes) -> None:
    for operation in compiled.operations:
        if shapes.cache_hlo_type in operation.result_type:
            assert operation.name in {KERNEL, *VIEWS}, operation.text


def assert_nothing_around_the_kernel(compiled: CompiledKernel, shapes: Shapes) -> None:
    names = [operation.name for operation in compiled.operations]
    assert names.count(KERNEL) == 1
    allowed = allowed_around(shapes)
    unexpected = [
        operation.text
        for operation in compiled.operations
        if operation.name not in {KERNEL, *VIEWS, *PREFETCH, *allowed}
    ]
    assert not unexpected, unexpected
    if not allowed:
        assert compiled.temp_bytes == 0


def check(shapes: Shapes, chip: str, **options) -> None:
    compiled = compile_kernel(shapes, chip, **options)
    if options.get("update_kv_cache", True):
        assert_cache_is_one_buffer(compiled, shapes)
    else:
        # Rule 9: aliasing a cache that is not written costs a copy of it.
        assert compiled.alias_bytes == 0
        assert_cache_is_not_copied(compiled, shapes)
    assert_nothing_around_the_kernel(compiled, shapes)
    if not has_more_code(shapes, chip):
        loops = 2 if options.get("chunk_prefill_size") else 1
        assert most_bundles(compiled.code_bytes) <= most_code(loops)


def has_more_code(shapes: Shapes, chip: str) -> bool:
    """Whether loops have to be measured one by one, which test_code_size.py does."""
    is_widened = shapes.num_kv_heads == 32 and shapes.cache_dtype == "float8_e4m3fn"
    return "float32" in (shapes.q_dtype, shapes.cache_dtype) or (
        is_widened and chip == "v5e"
    )


CHIPS = [*reversed(chips.COMPILED)]
BOTH_CACHES = ("bfloat16", "float8_e4m3fn")
# A compilation takes 20 to 60 seconds of a core. In every run each chip compiles the
# first model with a bfloat16 cache, and each other model is compiled with both caches,
# on one chip each, so that every chip has both. The rest is left to a longer run.
FIRST, *OTHERS = MODELS
ALWAYS = {(FIRST, "bfloat16", chip) for chip in CHIPS} | {
    (FIRST, BOTH_CACHES[1], "v6e")
}
for number, model in enumerate(OTHERS):
    one, two = (CHIPS[(number + i) % len(CHIPS)] for i in range(2))
    # The largest program of all is v5e's with 32 key heads in float8.
    one = "tpu7x" if model == "phi3" else one
    ALWAYS |= {(model, "float8_e4m3fn", one), (model, "bfloat16", two)}
MATRIX = [
    pytest.param(
        *combination, marks=() if combination in ALWAYS else pytest.mark.extended
    )
    for combination in itertools.product(MODELS, BOTH_CACHES, CHIPS)
]


@pytest.mark.slow
@pytest.mark.parametrize("model, cache_dtype, chip", MATRIX)
def test_models_compile_with_nothing_around_the_kernel(model, cache_dtype, chip):
    shapes = dataclasses.replace(MODELS[model], cache_dtype=cache_dtype)
    check(shapes, chip, **MODEL_OPTIONS.get(model, {}))


VIEWED = [
    TokenRows(num_heads, lanes, jnp.dtype(dtype))
    for num_heads, lanes, dtype in [
        (32, 128, "bfloat16"),
        (2, 256, "bfloat16"),
        (4, 256, "bfloat16"),
        (8, 256, "bfloat16"),
        (32, 256, "bfloat16"),
        (16, 512, "bfloat16"),
        (1, 256, "float32"),
        (4, 256, "float32"),
        (24, 384, "float32"),
    ]
] + [
    HeadRows(num_heads, lanes, jnp.dtype(jnp.bfloat16))
    for num_heads in (1, 3)
    for lanes in (128, 256)
]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("layout", VIEWED, ids=str)
def test_views_of_tokens_are_the_same_bytes(layout, chip):
    """Of an argument and, by token, of a result: here of a kernel that copies it."""
    order = (1, 0, 2) if isinstance(layout, HeadRows) else (0, 1, 2)
    shape = 64, layout.num_heads, layout.lanes
    names = view_operations(layout, shape, order, chip)
    assert names.count(KERNEL) == 1
    assert set(names) <= {KERNEL, *VIEWS, *PREFETCH}, names


LLAMA = MODELS["llama3_8b"]
# Features are compiled with a program of small tiles, which takes half the time.
FEW_TOKENS = dataclasses.replace(LLAMA, num_tokens=128)
VARIANTS = {
    "int8": ("v6e", {"cache_dtype": "int8"}, {"k_scale": 0.1, "v_scale": 0.1}),
    "int8_queries": ("v5e", {"cache_dtype": "int8"}, {"q_scale": 0.1, "k_scale": 0.1}),
    "e4m3_queries": ("tpu7x", {"cache_dtype": "float8_e4m3fn"}, {"q_scale": 0.1}),
    "e4m3_probabilities": (
        "tpu7x",
        {"cache_dtype": "float8_e4m3fn"},
        {"q_scale": 0.1, "probabilities_dtype": "float8_e4m3fn"},
    ),
    "e4m3_probabilities_d256": (
        "tpu7x",
        {"cache_dtype": "float8_e4m3fn", "head_dim": 256, "num_tokens": 128},
        {"soft_cap": 30.0, "probabilities_dtype": "float8_e4m3fn"},
    ),
    "e5m2": ("tpu7x", {"cache_dtype": "float8_e5m2"}, {"k_scale": 0.5}),
    "f32_cache": ("v6e", {"cache_dtype": "float32"}, {}),
    "f32_queries": ("tpu7x", {"q_dtype": "float32", "num_tokens": 32}, {}),
    "all_f32": (
        "v5e",
        {"q_dtype": "float32", "cache_dtype": "float32", "num_tokens": 32},
        {},
    ),
    "no_update": ("v6e", {}, {"update_kv_cache": False}),
    "no_update_e4m3": (
        "tpu7x",
        {"cache_dtype": "float8_e4m3fn"},
        {"update_kv_cache": False},
    ),
    "chunk_prefill": ("tpu7x", {}, {"chunk_prefill_size": 64}),
    "chunk_prefill_512": (
        "tpu7x",
        {"num_tokens": LLAMA.num_tokens},
        {"chunk_prefill_size": 512},
    ),
    "drafts": ("tpu7x", {}, {"decode_q_len": 4}),
    "drafts_window_e4m3": (
        "v5e",
        {"cache_dtype": "float8_e4m3fn", "num_q_heads": 24},
        {"decode_q_len": 7, "sliding_window": 1000},
    ),
    "drafts_one_key_head": (
        "v6e",
        {"num_q_heads": 8, "num_kv_heads": 1},
        {"decode_q_len": 16},
    ),
    "causal_blocks": ("tpu7x", {}, {"causal_block": 32}),
    "causal_blocks_drafts": (
        "v6e",
        {"cache_dtype": "float8_e4m3fn"},
        {"causal_block": 1024, "decode_q_len": 4, "sliding_window": 1000},
    ),
    "causal_blocks_f32": (
        "v5e",
        {"q_dtype": "float32", "cache_dtype": "float32", "num_tokens": 32},
        {"causal_block": 4, "attend": "new", "return_lse": True},
    ),
    "batch_invariant": ("tpu7x", {}, {"batch_invariant": True}),
    "batch_invariant_window_e4m3": (
        "v6e",
        {"cache_dtype": "float8_e4m3fn", "num_q_heads": 8, "num_kv_heads": 1},
        {"batch_invariant": True, "sliding_window": 1000},
    ),
    "batch_invariant_f32": (
        "v5e",
        {"q_dtype": "float32", "cache_dtype": "float32", "num_tokens": 32},
        {"batch_invariant": True, "return_lse": True},
    ),
    "soft_cap_full": ("v6e", {}, {"soft_cap": 30.0, "causal": False}),
    "out_f32": ("v6e", {}, {"out_dtype": "float32"}),
    "d32": ("v6e", {"head_dim": 32}, {}),
    "d192": ("v6e", {"head_dim": 192}, {}),
    "d384_int8": (
        "v6e",
        {"head_dim": 384, "num_q_heads": 16, "cache_dtype": "int8"},
        {"sliding_window": 1000},
    ),
    "d512": ("tpu7x", {"head_dim": 512, "num_q_heads": 32, "num_kv_heads": 4}, {}),
    "d512_e4m3": (
        "v6e",
        {
            "head_dim": 512,
            "num_q_heads": 8,
            "num_kv_heads": 1,
            "cache_dtype": "float8_e4m3fn",
        },
        {"q_scale": 0.1},
    ),
    "d512_f32": (
        "v5e",
        {
            "head_dim": 512,
            "q_dtype": "float32",
            "cache_dtype": "float32",
            "num_tokens": 32,
        },
        {},
    ),
    "odd_heads": ("tpu7x", {"num_q_heads": 7, "num_kv_heads": 7}, {}),
    "odd_key_heads": (
        "v6e",
        {"num_q_heads": 24, "num_kv_heads": 3, "head_dim": 256},
        {},
    ),
    "mqa_d64": ("tpu7x", {"num_q_heads": 8, "num_kv_heads": 1, "head_dim": 64}, {}),
    "heads_24": ("v6e", {"num_q_heads": 24}, {}),
    "heads_14": ("v6e", {"num_q_heads": 14, "num_kv_heads": 2, "head_dim": 64}, {}),
    "page_8": ("v6e", {"page_size": 8, "pages_per_sequence": 512}, {}),
    "page_16_e4m3": (
        "v5e",
        {
            "page_size": 16,
            "pages_per_sequence": 512,
            "cache_dtype": "float8_e4m3fn",
        },
        {},
    ),
    "page_512_window": (
        "tpu7x",
        {"page_size": 512, "num_pages": 128},
        {"sliding_window": 1000},
    ),
}


# Of these, another one here has each part: they are left to a longer run.
COMBINED = (
    "causal_blocks",
    "causal_blocks_drafts",
    "causal_blocks_f32",
    "chunk_prefill_512",
    "f32_cache",
    "heads_24",
    "int8",
    "no_update_e4m3",
    "page_16_e4m3",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.extended if name in COMBINED else ())
        for name in VARIANTS
    ],
)
def test_other_features_compile_with_nothing_around_the_kernel(name):
    chip, sizes, options = VARIANTS[name]
    check(dataclasses.replace(FEW_TOKENS, **sizes), chip, **options)


QUANTISED = {"cache_dtype": "float8_e4m3fn", "array_scales": ("k_scale", "v_scale")}
SCALED = {
    "tpu7x": (
        "tpu7x",
        {"array_scales": ("q_scale", *QUANTISED["array_scales"])},
        {"probabilities_dtype": "float8_e4m3fn"},
    ),
    "v6e": ("v6e", {"head_dim": 64, "with_sinks": True}, {"sliding_window": 128}),
    "v5e": ("v5e", {"num_q_heads": 24, "num_kv_heads": 3}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALED)
def test_scales_of_heads_add_only_arrays_of_heads_to_the_kernel(name):
    chip, sizes, options = SCALED[name]
    shapes = dataclasses.replace(FEW_TOKENS, **(QUANTISED | sizes))
    compiled = compile_kernel(shapes, chip, **options)
    assert_cache_is_one_buffer(compiled, shapes)
    most = 5 * shapes.num_kv_heads  # factors of queries, scores, keys, values, outputs
    allowed = {KERNEL, *VIEWS, *PREFETCH, *allowed_around(shapes)}
    for operation in compiled.operations:
        sizes = [
            math.prod(map(int, axes.split(",")))
            for axes in re.findall(r"\[(\d[\d,]*)\]", operation.result_type)
        ]
        is_small = max(sizes, default=1) <= most
        assert operation.name in allowed or is_small, operation.text


def test_a_copy_of_the_cache_would_be_found():
    """The checks can fail."""
    cache = f"{LLAMA.cache_hlo_type}{{4,3,2,1,0}}"
    kernel, view, copy = (
        Operation(name, cache, f"%{name} = {cache} {name}()")
        for name in (KERNEL, "bitcast", "copy")
    )
    shapes = LLAMA
    compiled = CompiledKernel((kernel, view), shapes.cache_bytes, 0, 0)
    copied = dataclasses.replace(compiled, operations=(kernel, view, copy))
    assert_cache_is_one_buffer(compiled, shapes)
    assert_nothing_around_the_kernel(compiled, shapes)
    with pytest.raises(AssertionError):
        assert_cache_is_not_copied(copied, shapes)
    with pytest.raises(AssertionError):
        assert_nothing_around_the_kernel(copied, shapes)

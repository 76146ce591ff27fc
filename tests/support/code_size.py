"""How many bundles of instructions the kernel's loops may have. All limits are here.

Instruction memory holds 65,536 bundles, and an overlay, the piece in which a program is
fetched, about 21,700. A longer loop is a jumbo overlay, which nothing prefetches; a
loop that does not fit instruction memory is fetched again in every iteration. See
``benchmarks/README.md``, "Instruction memory".
"""

from __future__ import annotations

# No loop of any shape is longer.
LARGEST_LOOP = 60_000
# A loop in which a step spends its time is no longer, but for those of ``LONGER``.
HOT_LOOP = 21_000
# Why a shape's loop may be longer than ``HOT_LOOP``: by the name of the shape in
# tests/jax_kernels/test_code_size.py.
_WHOLE_CELL = (
    "16 softmax tiles in one stretch of prefill, which is fetched once a call (about "
    "2 us); with 8 of them 2,048 tokens at 8,192 take 2 % longer on v6e"
)
_PARTS = (
    "code for one and two parts of a tile, in which 16 prompts of 403 to 1,494 tokens "
    "take 16 % less on TPU7x with 8/1 heads"
)
_HEADS_OF_512 = (
    "4 softmax tiles of 512 lanes in one stretch of prefill; with 2 of them 2,048 "
    "tokens at 8,192 take 6 % longer on v6e and 7 % on TPU7x"
)
_PRODUCTS_IN_F32 = "products in float32, of which a stretch has one softmax tile"
_EVERY_HEAD = (
    "keys and values of 32 key heads, which narrow matrix units take in many pieces; "
    "with 8 softmax tiles in a stretch instead of 16 it has 47,145 bundles on v5e"
)
LONGER: dict[str, str] = {
    **dict.fromkeys(("32/8", "32/8 fp8", "32/8 window", "64/8"), _WHOLE_CELL),
    **dict.fromkeys(("8/1", "8/1 fp8", "8/1 of 64", "16/1"), _PARTS),
    **dict.fromkeys(("32/8 of 256", "32/4 of 256", "8/4 of 256"), _PARTS),
    **dict.fromkeys(("32/32 of 96", "32/32 of 96 fp8"), _EVERY_HEAD),
    **dict.fromkeys(("32/4 of 512", "32/4 of 512 fp8"), _HEADS_OF_512),
    "32/4 of 512 f32": _PRODUCTS_IN_F32,
}
# What has a loop that is longer than ``LARGEST_LOOP``, by name and chip, and how long.
# Every step of these shapes fetches its instructions again.
TOO_LONG = {
    ("32/4 of 512 f32", "v5e"): "127,395 bundles, of them 44,730 in one stretch",
}

BUNDLE_BYTES = 64
# What libtpu puts into every program beside its kernels, at least.
RUNTIME_BYTES = 1_000_000


def most_code(prefill_loops: int) -> int:
    """Bundles that a kernel should not exceed: its loops of prefill, and all the rest.

    So much is not too long a loop for sure: loops are measured one by one in a longer
    run. But whatever is longer has to be looked at.
    """
    return prefill_loops * LARGEST_LOOP + HOT_LOOP


def most_bundles(code_bytes: int) -> int:
    """Bundles that a kernel has at most.

    Args:
      code_bytes: Generated code of a program, as ``memory_analysis`` tells it.
    """
    return (code_bytes - RUNTIME_BYTES) // BUNDLE_BYTES

"""What XLA puts around the kernel, by the text of small programs."""

import pytest

from benchmarks import surroundings

# A conversion that the kernel reads, and names for what it returns.
CONVERTED = """HloModule jit_call, is_scheduled=true

%fused (p: bf16[8,128]) -> bf16[8,128] {
  ROOT %negate.1 = bf16[8,128]{1,0:T(8,128)(2,1)} negate(%p)
}

ENTRY %main.1 (q: bf16[16,8,128], lens: s32[16]) -> bf16[16,8,128] {
  %lens = s32[16]{0:T(128)} parameter(1), sharding={replicated}
  %q = bf16[16,8,128]{2,1,0:T(8,128)(2,1)} parameter(0), sharding={replicated}
  %convert.3 = f32[16,8,128]{2,1,0:T(8,128)} convert(%q), metadata={op_name="x(y)"}
  %bitcast.4 = f32[16,8,1,128]{3,2,1,0:T(1,128)} bitcast(%convert.3)
  KERNEL
  %get.4 = bf16[16,4,2,128]{3,2,1,0:T(2,128)(2,1)} get-tuple-element(%rpa.1), index=0
  ROOT %bitcast.7 = bf16[16,8,128]{2,1,0:T(8,128)(2,1)} bitcast(%get.4)
}
""".replace(
    "KERNEL",
    "%rpa.1 = (bf16[16,4,2,128]{3,2,1,0:T(2,128)(2,1)}, bf16[9,9]{1,0}) custom-call("
    '%lens, /*index=5*/%bitcast.4), custom_call_target="tpu_custom_call", metadata={}',
)


def test_a_conversion_counts_with_what_it_reads_and_writes():
    (convert,) = surroundings.operations(CONVERTED)
    assert convert.name == "convert"
    assert convert.bytes == 16 * 8 * 128 * (2 + 4)
    assert surroundings.bytes_around(CONVERTED) == convert.bytes


def test_nothing_around_the_kernel_is_nothing():
    bare = CONVERTED.replace("convert(%q)", "bitcast(%q)")
    assert surroundings.bytes_around(bare) == 0


@pytest.mark.parametrize(
    ("array_type", "expected"),
    [
        ("bf16[256,1,128]{2,1,0:T(8,128)(2,1)}", 256 * 8 * 128 * 2),
        ("bf16[256,1,128]{2,0,1:T(8,128)(2,1)}", 256 * 128 * 2),
        ("f8e4m3fn[3,96]{1,0:T(8,128)(4,1)}", 8 * 128),
        ("s32[65]{0:T(128)}", 128 * 4),
        ("f32[]", 4),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 0),  # in VMEM
        ("(f32[8]{0}, bf16[8]{0})", 8 * (4 + 2)),
    ],
)
def test_arrays_count_with_the_padding_of_their_tiles(array_type, expected):
    assert surroundings._hbm_bytes(array_type) == expected


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="optimised HLO, got 'nothing'"):
        surroundings.bytes_around("nothing")

# ruff: noqa: E501  (the lines are the compiler's)
"""A tiny kernel in the compiler's dump format, for tests.

It prefetches s32[128] into SMEM, then loops smem[0] times; every iteration
fetches 32 KiB, waits for it, and issues two matmuls.
"""

import re
from pathlib import Path

ALLOCATIONS = """\
  #allocation1 [shape = 's32[1]{0}', space=sflag, size = 0x4, scoped, tag = 'scoped memory']
  #allocation2 [shape = 'u8[512]{0}', space=smem, size = 0x200, scoped, tag = 'prefetched SMEM operand 0']
  #allocation3 [shape = 'bf16[128,128]{1,0}', space=vmem, size = 0x8000, scoped, tag = 'scratch operand']
  #allocation4 [shape = 's32[2]{0}', space=sflag, size = 0x8, scoped, tag = 'scratch operand']
"""

POST_RA = """\
     0   :  { %s10_s0 = inlined_call_operand.hbm [shape: s32[128], index: 0, kind: input, shape index: {}] /* operand 0 */  ;;  %s11_s1 = inlined_call_operand.hbm [shape: bf16[1024,128], index: 1, kind: input, shape index: {}] /* operand 1 */  ;;  %s12_s2 = smov.u32 [#allocation2] /* materialized constant */ }
   0x1   :  { %18 = dma.hbm_to_smem /*hbm=*/%s10_s0, /*size_in_granules=*/16, /*smem=*/%s12_s2, /*dst_syncflagno=*/[#allocation1] }
   0x2   :  { %19 = dma.done.wait [#allocation1], 16 }
   0x3   :  { %20 = vsyncadd [#allocation1], 4294967280 }
   0x4   :  { %s13_s3 = sld [smem:[#allocation2]]  ;;  %s14_s4 = smov.u32 0 }
   0x5   :  {}
   0x6   :  { %p15_p0 = scmp.le.s32.totalorder %s13_s3, 0 }
   0x7   :  { %21 = sbr.rel (%p15_p0) target bundleno = 29 (0x1d), region = 9 }
   0x8   :  { %s16_s5 = smov.u32 [#allocation3] }
   0x9   :  { %s17_s5 = sshll.u32 %s16_s5, 4  ;;  %s18_s5 = int_to_ptr.vmem [resolvable:$true] %s17_s5 }
   0xa   :  {}
   0xb   :  {}
   0xc   :  {}
   0xd   :  { %s30_s6 = smov.u32 1024 } /* End region 1 */
   0xe LB: > { %22 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s11_s1, /*size_in_granules=*/%s30_s6, /*vmem=*/%s18_s5, /*dst_syncflagno=*/[#allocation4 + $0x1], /*src_stride=*/%s30_s6, /*dst_stride=*/%s30_s6, /*steps_per_stride=*/%s30_s6  ;;  %s19_s4 = sphi %s14_s4, %s20_s4 } /* Start region 8 */
   0xf   : > { %23 = dma.done.wait [#allocation4 + $0x1], 1024 }
  0x10   : > { %24 = vsyncadd [#allocation4 + $0x1], 4294966272 }
  0x11   : > { %v1_v0 = vld [vmem:[#allocation3] sm:$0xff]  ;;  %25 = vmatmul.mubr.bf16.gmra.mrb[0].mxu0 %v1_v0 }
  0x12   : > { %26 = vmatmul.mubr.bf16.gmra.mrb[4].mxu0 %v1_v0  ;;  %s20_s4 = sadd.s32 1, %s19_s4 }
  0x13   : > {}
  0x14   : > { %p21_p1 = scmp.ge.s32.totalorder %s20_s4, %s13_s3 }
  0x15   : > { %27 = sbr.rel (!%p21_p1) target bundleno = 14 (0xe), region = 8 }
  0x16   : > { %28 = sst [smem:[#allocation2 + $0x1]] %s20_s4 }
  0x17   : > {}
  0x18   : > {}
  0x19   : > {}
  0x1a   : > {}
  0x1b   : > {} /* End region 8 */
  0x1c PF:  { %29 = sst [smem:[#allocation2 + $0x2]] %s13_s3 }
  0x1d PF:  {} /* Start/End empty region 9 */
"""

UNITS = """\
== CAPACTIY:
MATMUL, VLOAD, SALU
    2     3     2
== UTILIZATION:
"""


def write(directory: Path) -> Path:
    """Writes the dump files; returns the directory."""
    prefix = "123-toy.1-"
    (directory / f"{prefix}53-post-ra.txt").write_text(ALLOCATIONS)
    (directory / f"{prefix}64-packed-bundles-post-ra.txt").write_text(POST_RA)
    # The shipped listing: the empty bundle 0x5 is folded into a delay.
    final = re.sub(
        r"target bundleno = \d+ \(0x[0-9a-f]+\), region = (\d+)",
        r"target = $region\1",
        POST_RA,
    )
    (directory / f"{prefix}71-final_bundles.txt").write_text(_without_bundle(final, 5))
    rows = []
    for line in POST_RA.splitlines():
        rows.append(
            f"{line.count('= vmatmul')} {line.count('= vld')} {line.count('= s')}"
        )
    (
        directory / f"{prefix}67-pre-delay_hlo-static-per-bundle-utilization.txt"
    ).write_text(UNITS + "\n".join(rows) + "\n")
    return directory


def _without_bundle(text: str, dropped: int) -> str:
    lines = []
    for position, line in enumerate(text.splitlines()):
        if position != dropped:
            label = "0" if not lines else f"{len(lines):#x}"
            lines.append(f"{label:>6}" + line[6:])
    return "\n".join(lines) + "\n"

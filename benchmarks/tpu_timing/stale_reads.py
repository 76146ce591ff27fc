"""Checks that a listing can be executed bundle by bundle."""

from __future__ import annotations

from benchmarks.tpu_timing.program import Program


def find_stale_reads(program: Program) -> list[str]:
    """Reads whose virtual name is not the one last written to that register.

    An empty result shows that, inside every block, writes become visible in the
    next bundle, so executing the listing bundle by bundle is exact.
    """
    problems = []
    for block in program.blocks.values():
        last: dict[tuple[str, int], set[str]] = {}
        for position in range(block.start, block.end):
            code = program.scalar_code[position]
            for ins in code:
                if ins.is_rename:
                    continue
                for register in ins.reads():
                    names = last.get((register.bank, register.number))
                    if names is not None and register.name not in names:
                        problems.append(
                            f"{position:#x}: {register.name} read, "
                            f"{sorted(names)} written"
                        )
            for ins in code:
                if ins.target is None:
                    continue
                key = (ins.target.bank, ins.target.number)
                if ins.is_rename:
                    if key in last:
                        last[key] = last[key] | {ins.target.name}
                elif ins.predicate:
                    if (
                        key in last
                    ):  # otherwise the register may still hold an older value
                        last[key] = last[key] | {ins.target.name}
                else:
                    last[key] = {ins.target.name}
    return problems

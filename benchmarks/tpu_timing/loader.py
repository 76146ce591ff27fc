"""Makes a program of the compiler's dump files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.tpu_timing import codegen, control_flow, core, isa, listing, memory_map
from benchmarks.tpu_timing.program import Program, UnitUse
from jax_kernels.chips import Chip


def load_kernel(
    dump_dir: str | Path, name_contains: str, chip: Chip | None = None
) -> Program:
    """Loads the only kernel of a dump directory with such a name.

    Args:
      dump_dir: Where the compiler wrote its files.
      name_contains: Part of the kernel's name.
      chip: What was compiled for. Without it the number of delay slots is inferred.

    Raises:
      LookupError: No such kernel, or several.
      FileNotFoundError: The kernel has no bundle listing.
    """
    files = listing.find_kernel(dump_dir, name_contains)
    warnings: list[str] = []
    bundles, is_exact = _read_bundles(files, warnings)
    units = _read_units(files, is_exact, len(bundles), warnings)
    scalar_code = [_scalar_code(bundle) for bundle in bundles]
    operands = {
        i.kernel_operand.index: i.kernel_operand
        for code in scalar_code
        for i in code
        if i.kernel_operand
    }
    allocations = listing.read_allocations(files.post_ra) if files.post_ra else {}
    memory = memory_map.lay_out(bundles, scalar_code, allocations, operands)
    if chip is not None and chip.name in core.BRANCH_DELAY_SLOTS:
        delay_slots = core.BRANCH_DELAY_SLOTS[chip.name]
    else:
        delay_slots = control_flow.infer_delay_slots(bundles, scalar_code)
    blocks = control_flow.form_blocks(
        bundles, scalar_code, delay_slots if is_exact else None
    )
    matmuls = [isa.matmul_issues(bundle.text) for bundle in bundles]
    source, stretches = codegen.generate(blocks, scalar_code, matmuls, memory)
    return Program(
        kernel=files.kernel,
        bundles=bundles,
        scalar_code=scalar_code,
        operands=operands,
        memory=memory,
        branch_delay_slots=delay_slots,
        blocks=blocks,
        stretches=stretches,
        source=source,
        code=compile(source, f"<{files.kernel}>", "exec"),
        units=units,
        warnings=[*warnings, *memory.warnings],
    )


def _read_bundles(
    files: listing.KernelFiles, warnings: list[str]
) -> tuple[list[listing.Bundle], bool]:
    """The listing, and whether each of its bundles is one cycle."""
    if files.post_ra_bundles is None:
        if files.final_bundles is None:
            raise FileNotFoundError(f"{files.kernel}: no bundle listing")
        warnings.append("no packed-bundles-post-ra file: folded delays are not counted")
        return listing.read_bundles(files.final_bundles), False
    bundles = listing.read_bundles(files.post_ra_bundles)
    if files.final_bundles is not None:
        final = listing.read_bundles(files.final_bundles)
        if not listing.same_instructions(final, bundles):
            warnings.append("final_bundles and packed-bundles-post-ra differ")
    return bundles, True


def _read_units(
    files: listing.KernelFiles, is_exact: bool, num_bundles: int, warnings: list[str]
) -> UnitUse:
    """What units do in each bundle; no units if the file is missing or another's."""
    path = files.post_ra_units if is_exact else files.final_units
    if path:
        units = UnitUse(*listing.read_unit_usage(path))
        if len(units.usage) == num_bundles:
            return units
        warnings.append(
            f"unit usage has {len(units.usage)} rows for {num_bundles} bundles; ignored"
        )
    return UnitUse([], np.zeros(0, np.int64), np.zeros((num_bundles, 0), np.int64))


def _scalar_code(bundle: listing.Bundle) -> list[isa.Instruction]:
    return [
        isa.parse_instruction(part)
        for part in isa.split_bundle(bundle.text)
        if not isa.is_vector(part)
    ]

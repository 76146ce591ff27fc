"""Makes a program of the compiler's dump files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from benchmarks.tpu_timing import (
    code_size,
    codegen,
    control_flow,
    core,
    isa,
    listing,
    memory_map,
    overlays,
)
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
    bundles, final, is_exact = _read_bundles(files, warnings)
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
    addresses = _final_addresses(bundles, final)
    chip_name = "" if chip is None else chip.name
    sizes = core.OVERLAY_SIZES.get(chip_name, core.LEAST_OVERLAY_SIZES)
    layout = _read_overlays(dump_dir, final, sizes, int(addresses[-1]), warnings)
    cuts = [] if layout is None else [start for start, _ in layout.starts]
    blocks = control_flow.form_blocks(
        bundles,
        scalar_code,
        delay_slots if is_exact else None,
        np.searchsorted(addresses, cuts).tolist(),
    )
    matmuls = [isa.matmul_issues(bundle.text) for bundle in bundles]
    source, stretches = codegen.generate(blocks, scalar_code, matmuls, memory)
    program = Program(
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
        final_addresses=addresses,
        overlays=layout,
        overlay_sizes=sizes if layout is None else layout.program.sizes,
        warnings=[*warnings, *memory.warnings],
    )
    program.warnings.extend(map(str, code_size.find_oversize_loops(program)))
    return program


def _read_bundles(
    files: listing.KernelFiles, warnings: list[str]
) -> tuple[list[listing.Bundle], list[listing.Bundle] | None, bool]:
    """The listing, the final one, and whether each bundle of the first is one cycle.

    There is no final listing if its file is missing, or is another program's.
    """
    if files.post_ra_bundles is None:
        if files.final_bundles is None:
            raise FileNotFoundError(f"{files.kernel}: no bundle listing")
        warnings.append("no packed-bundles-post-ra file: folded delays are not counted")
        final = listing.read_bundles(files.final_bundles)
        return final, final, False
    bundles, final = listing.read_bundles(files.post_ra_bundles), None
    if files.final_bundles is not None:
        final = listing.read_bundles(files.final_bundles)
        if not listing.same_instructions(final, bundles):
            warnings.append("final_bundles and packed-bundles-post-ra differ")
            final = None
    return bundles, final, True


def _final_addresses(
    bundles: list[listing.Bundle], final: list[listing.Bundle] | None
) -> np.ndarray:
    """Without a final listing, as if all its bundles had instructions."""
    if final is None:
        final = [bundle for bundle in bundles if bundle.text]
        final = [dataclasses.replace(b, address=n) for n, b in enumerate(final)]
    return listing.final_addresses(final, bundles)


def _read_overlays(
    dump_dir: str | Path,
    final: list[listing.Bundle] | None,
    sizes: overlays.OverlaySizes,
    num_bundles: int,
    warnings: list[str],
) -> overlays.Layout | None:
    """The overlays of a kernel, or None and a warning.

    What the compiler says nothing of is one overlay, if it is short enough.
    """
    text = overlays.read_logs(dump_dir)
    if text and final is not None:
        branches = control_flow.find_branches(final, list(map(_branches_of, final)))
        targets = {source: target for source, (target, _) in branches.items()}
        programs = overlays.parse_log(text)
        layout = overlays.find_kernel(programs, targets, num_bundles)
        if layout is not None:
            return layout
        warnings.append("the kernel is in no program of the log of overlays")
    if num_bundles <= sizes.regular:
        return overlays.single_overlay(num_bundles, sizes)
    warnings.append(
        f"no log says how {num_bundles} bundles are cut into overlays: fetches of "
        "instructions are not counted"
    )
    return None


def _branches_of(bundle: listing.Bundle) -> list[isa.Instruction]:
    if "sbr.rel" not in bundle.text:
        return []
    parts = isa.split_bundle(bundle.text)
    return [isa.parse_instruction(part) for part in parts if "sbr.rel" in part]


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

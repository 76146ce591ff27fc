"""Reads the compiler's text dumps: bundle listings, allocation tables, unit usage.

Three files of one kernel matter (NN is the pass number, which varies):

  *-NN-final_bundles.txt                      the shipped VLIW bundles
  *-NN-packed-bundles-post-ra.txt             the same bundles *before* runs of
                                              empty bundles are folded into delays
  *-NN-post-ra.txt                            table of allocations with sizes
  *-NN-pre-delay_hlo-static-per-bundle-utilization.txt   unit usage, one row per
                                              bundle of packed-bundles-post-ra

The folded delays are invisible in final_bundles, so packed-bundles-post-ra is
the timing source whenever it is present: there one row is exactly one cycle and
every branch names its target bundle.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_BUNDLE = re.compile(
    r"^\s*(0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*((?:>\s*)*)\{(.*?)\}\s*(?:/\*.*\*/)?\s*$"
)
_BUNDLE_START = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:LB|LH|LE|PB|PF|CT)?\s*:")
_REGION_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_ALLOCATION = re.compile(
    r"#allocation(\d+)(?:_spill)? \[shape = .*?space=(\w+), size = (0x[0-9a-f]+|\d+)"
    r"(?:, offset = (0x[0-9a-f]+|\d+))?.*?tag = '(.*)'\]\s*$"
)


@dataclass
class Bundle:
    """One VLIW bundle of a listing."""

    address: int
    marker: str
    depth: int
    text: str  # the instructions, still joined by ' ;; '
    starts_regions: tuple[int, ...] = ()


@dataclass
class Allocation:
    """One row of the compiler's table of allocations."""

    number: int
    space: str  # smem, vmem, sflag, hbm
    size: int  # bytes
    offset: int | None  # fixed byte address, if any
    tag: str


@dataclass
class KernelFiles:
    """The dump files that belong to one kernel."""

    kernel: str
    final_bundles: Path | None
    post_ra_bundles: Path | None
    post_ra: Path | None
    post_ra_units: Path | None
    final_units: Path | None


def list_kernels(dump_dir: str | Path) -> list[str]:
    """Names of the kernels in a dump directory, without the timestamp prefix."""
    names = []
    for path in sorted(Path(dump_dir).iterdir()):
        match = re.match(r"^(\d+-.*)-\d+-final_bundles\.txt$", path.name)
        if match and "schedule-analysis" not in path.name:
            names.append(match.group(1))
    return names


def find_kernel(dump_dir: str | Path, name_contains: str) -> KernelFiles:
    """Files of the only kernel in dump_dir whose name contains name_contains."""
    names = [n for n in list_kernels(dump_dir) if name_contains in n]
    if len(names) != 1:
        raise LookupError(
            f"{name_contains!r} matches {names or 'no kernel'} in {dump_dir}"
        )
    return _files_of(Path(dump_dir), names[0])


def _files_of(directory: Path, prefix: str) -> KernelFiles:
    by_suffix = {}
    for path in directory.iterdir():
        if path.name.startswith(prefix + "-"):
            match = re.match(r"^-\d+-(.*)\.txt$", path.name[len(prefix) :])
            if match:
                by_suffix[match.group(1)] = path
    return KernelFiles(
        kernel=re.sub(r"^\d+-", "", prefix),
        final_bundles=by_suffix.get("final_bundles"),
        post_ra_bundles=by_suffix.get("packed-bundles-post-ra"),
        post_ra=by_suffix.get("post-ra"),
        post_ra_units=by_suffix.get("pre-delay_hlo-static-per-bundle-utilization"),
        final_units=by_suffix.get("final_hlo-static-per-bundle-utilization"),
    )


def _joined_lines(lines):
    """One string per bundle; comments inside a bundle may span lines."""
    current = None
    for line in lines:
        if _BUNDLE_START.match(line):
            if current is not None:
                yield current
            current = line.rstrip()
        elif current is not None:
            current += " " + line.strip()
    if current is not None:
        yield current.rstrip()


def read_bundles(path: str | Path) -> list[Bundle]:
    bundles = []
    with open(path) as lines:
        for line in _joined_lines(lines):
            match = _BUNDLE.match(line)
            if not match:
                raise ValueError(f"{path}: unreadable bundle: {line[:120]}")
            address, marker, depth, text = match.groups()
            regions = (
                tuple(map(int, _REGION_START.findall(line))) if "region" in line else ()
            )
            bundles.append(
                Bundle(
                    int(address, 16),
                    marker or "",
                    depth.count(">"),
                    text.strip(),
                    regions,
                )
            )
    for position, bundle in enumerate(bundles):
        if bundle.address != position:
            raise ValueError(
                f"{path}: bundle {position} has address {bundle.address:#x}"
            )
    return bundles


def read_allocations(path: str | Path) -> dict[int, Allocation]:
    table = {}
    with open(path) as lines:
        for line in lines:
            if "#allocation" not in line or "[shape = " not in line:
                continue
            match = _ALLOCATION.search(line)
            if match:
                number, space, size, offset, tag = match.groups()
                table[int(number)] = Allocation(
                    int(number),
                    space,
                    int(size, 0),
                    None if offset is None else int(offset, 0),
                    tag,
                )
    return table


def read_unit_usage(path: str | Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Unit names, their capacities per bundle, and one row of use counts per bundle."""
    with open(path) as handle:
        lines = handle.read().split("\n")
    names = [name.strip() for name in lines[1].split(",")]
    capacity = np.array(lines[2].split(), dtype=np.int64)
    rows = [line.split() for line in lines[4:] if line.strip()]
    return names, capacity, np.array(rows, dtype=np.int64).reshape(-1, len(names))


def final_addresses(final: list[Bundle], post_ra: list[Bundle]) -> np.ndarray:
    """Which bundle of the final listing each row before the folding of delays is in.

    Returns:
      [rows + 1], addresses in the final listing. A row that was folded away has that
      of the next bundle, and the last element is the length of the final listing.
      Both listings have to hold the same instructions.
    """
    addresses = np.array([b.address for b in final if b.text] + [len(final)])
    is_kept = np.array([bool(b.text) for b in post_ra])
    return addresses[np.concatenate([[0], np.cumsum(is_kept)])]


def same_instructions(final: list[Bundle], post_ra: list[Bundle]) -> bool:
    """True if both listings hold the same non-empty bundles in the same order."""

    def key(text):  # branch targets are written differently
        return re.sub(r"target .*?(?= ;;|$)", "", re.sub(r"\s+", " ", text))

    left = [key(b.text) for b in final if b.text]
    right = [key(b.text) for b in post_ra if b.text]
    return left == right

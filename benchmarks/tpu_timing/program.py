"""Turns a bundle listing into basic blocks of generated Python.

Each block becomes one Python function `block_<start>(t) -> (next_start, t)` that
updates scalar registers, predicates and SMEM, and calls the timing hooks of the
machine for DMA, sync flags and matmuls. Vector bundles cost only their cycles.
"""

from __future__ import annotations

import math
import re
import types
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.tpu_timing import core, isa, listing
from benchmarks.tpu_timing.isa import Address, Immediate, Instruction, Register
from jax_kernels.chips import Chip

EXIT = -1

DTYPE_BYTES = {
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "s8": 1,
    "u8": 1,
    "pred": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "f8e4m3": 1,
    "s4": 0.5,
    "u4": 0.5,
    "f4e2m1fn": 0.5,
}
VMEM_ROW_BYTES = 512  # unit of VMEM addresses
GRANULE_BYTES = 32  # on every generation tried
WORD_BYTES = 4  # unit of SMEM and sync-flag addresses


def operand_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return int(math.prod(shape) * DTYPE_BYTES.get(dtype, 4))


@dataclass
class Block:
    """Bundles that always execute one after the other."""

    start: int
    end: int  # first bundle after the block, delay slots included
    successors: tuple[int, ...]
    branch: int | None  # bundle of the branch that ends the block


@dataclass
class MatmulStretch:
    """Straight-line bundles between two timing events, with their matmuls."""

    cycles: int
    issues: tuple[tuple[int, int, str], ...]  # (cycle offset, mxu, dtype)


@dataclass
class Region:
    """An operand or spill area whose words can be moved to or from SMEM."""

    space: str  # hbm or vmem
    name: str
    base: int  # granules
    granules: int
    operand_index: int | None


@dataclass
class Program:
    """A kernel that can be executed: its listing, memory layout and blocks."""

    kernel: str
    bundles: list[listing.Bundle]
    cycles_of_bundle: np.ndarray
    source_bundles: int  # non-empty bundles, as shipped
    exact_delays: bool
    scalar_code: list[list[Instruction]]
    matmuls: list[list[isa.MatmulIssue]]
    allocations: dict[int, listing.Allocation]
    operands: dict[int, isa.KernelOperand]
    granule_bytes: int
    hbm_pointer_granules: (
        int  # unit of HBM addresses in registers (not in DMA operands)
    )
    branch_delay_slots: int
    unit_names: list[str]
    unit_capacity: np.ndarray
    unit_usage: np.ndarray
    allocation_base: dict[int, int] = field(default_factory=dict)
    operand_base: dict[int, int] = field(default_factory=dict)
    regions: list[Region] = field(default_factory=list)
    smem_words: int = 0
    blocks: dict[int, Block] = field(default_factory=dict)
    stretches: list[MatmulStretch] = field(default_factory=list)
    source: str = ""
    code: types.CodeType | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def static_matmuls(self) -> int:
        return sum(map(len, self.matmuls))


def load_kernel(
    dump_dir: str | Path, name_contains: str, chip: Chip | None = None
) -> Program:
    return load_files(listing.find_kernel(dump_dir, name_contains), chip)


def load_listing(final_bundles: str | Path, chip: Chip | None = None) -> Program:
    """Loads a *-final_bundles.txt together with the files next to it."""
    return load_files(listing.files_of_listing(final_bundles), chip)


def load_files(files: listing.KernelFiles, chip: Chip | None = None) -> Program:
    warnings = []
    exact = files.post_ra_bundles is not None
    timed = files.post_ra_bundles or files.final_bundles
    if timed is None:
        raise FileNotFoundError(f"{files.kernel}: no bundle listing")
    bundles = listing.read_bundles(timed)
    if exact and files.final_bundles is not None:
        if not listing.same_instructions(
            listing.read_bundles(files.final_bundles), bundles
        ):
            warnings.append("final_bundles and packed-bundles-post-ra differ")
    if not exact:
        warnings.append("no packed-bundles-post-ra file: folded delays are not counted")
    allocations = listing.read_allocations(files.post_ra) if files.post_ra else {}
    units_file = files.post_ra_units if exact else files.final_units
    if units_file:
        names, capacity, usage = listing.read_unit_usage(units_file)
    else:
        names, capacity, usage = [], np.zeros(0, np.int64), np.zeros((0, 0), np.int64)
    if len(usage) != len(bundles):
        if units_file:
            warnings.append(
                f"unit usage has {len(usage)} rows for {len(bundles)} bundles; ignored"
            )
        names, capacity = [], np.zeros(0, np.int64)
        usage = np.zeros((len(bundles), 0), np.int64)

    scalar_code, matmuls, operands = [], [], {}
    for bundle in bundles:
        code = [
            isa.parse_instruction(p)
            for p in isa.split_bundle(bundle.text)
            if not isa.is_vector(p)
        ]
        for instruction in code:
            if instruction.kernel_operand:
                operands[instruction.kernel_operand.index] = instruction.kernel_operand
        scalar_code.append(code)
        matmuls.append(isa.matmul_issues(bundle.text))

    program = Program(
        kernel=files.kernel,
        bundles=bundles,
        cycles_of_bundle=np.ones(len(bundles), np.int64),
        source_bundles=sum(1 for b in bundles if b.text),
        exact_delays=exact,
        scalar_code=scalar_code,
        matmuls=matmuls,
        allocations=allocations,
        operands=operands,
        granule_bytes=GRANULE_BYTES,
        hbm_pointer_granules=_hbm_pointer_granules(scalar_code),
        branch_delay_slots=_delay_slots_of(chip, bundles, scalar_code),
        unit_names=names,
        unit_capacity=capacity,
        unit_usage=usage,
        warnings=warnings,
    )
    _lay_out_memory(program)
    _form_blocks(program)
    program.source = _generate(program)
    program.code = compile(program.source, f"<{program.kernel}>", "exec")
    return program


def _hbm_pointer_granules(scalar_code) -> int:
    """v5e keeps HBM pointers in 512-byte units and shifts them left by 4 for DMAs."""
    shifted = any(i.opcode == "int_to_ptr.hbm" for code in scalar_code for i in code)
    return 16 if shifted else 1


def _lay_out_memory(program: Program) -> None:
    granule = program.granule_bytes
    unit = {
        "smem": WORD_BYTES,
        "sflag": WORD_BYTES,
        "vmem": VMEM_ROW_BYTES,
        "hbm": granule,
    }
    next_free = {"smem": 0x400, "sflag": 0x100, "vmem": 0, "hbm": 1 << 20}
    for number, alloc in sorted(program.allocations.items()):
        step = unit.get(alloc.space, WORD_BYTES)
        if alloc.offset is not None:
            program.allocation_base[number] = alloc.offset // step
            continue
        base = next_free.setdefault(alloc.space, 0x400)
        align = max(step, 512 if alloc.space in ("vmem", "hbm") else 4)
        base = -(-base // align) * align
        program.allocation_base[number] = base // step
        next_free[alloc.space] = base + alloc.size
        if alloc.space == "hbm":
            program.regions.append(
                Region(
                    "hbm",
                    f"allocation{number}",
                    base // granule,
                    -(-alloc.size // granule),
                    None,
                )
            )
            program.allocation_base[number] //= program.hbm_pointer_granules
    mentioned = set()
    for bundle in program.bundles:
        mentioned.update(map(int, re.findall(r"#allocation(\d+)", bundle.text)))
    missing = sorted(mentioned - set(program.allocation_base))
    if missing:
        if program.allocations:
            program.warnings.append(f"{len(missing)} allocations are not in the table")
        # Space unknown: give each 1 Mi address units, far from the others.
        for position, number in enumerate(missing):
            program.allocation_base[number] = (1 << 22) + (position << 16)
        next_free["smem"] = max(
            next_free["smem"], ((1 << 22) + (len(missing) << 16)) * WORD_BYTES
        )
    base = -(-next_free["hbm"] // (1 << 20)) * (1 << 20)
    for index, operand in sorted(program.operands.items()):
        nbytes = operand_bytes(operand.dtype, operand.shape)
        if operand.space == "value":
            continue
        if (
            operand.alias
            and index == operand.alias[1]
            and operand.alias[0] in program.operand_base
        ):
            program.operand_base[index] = program.operand_base[operand.alias[0]]
            continue
        if operand.space in ("vmem", "smem"):
            step = unit[operand.space]
            start = -(-next_free[operand.space] // 512) * 512
            next_free[operand.space] = start + nbytes
            program.operand_base[index] = start // step
            if operand.space == "vmem":
                program.regions.append(
                    Region(
                        "vmem",
                        f"operand{index}",
                        start // granule,
                        -(-nbytes // granule),
                        index,
                    )
                )
            continue
        program.operand_base[index] = base // granule
        program.regions.append(
            Region(
                "hbm", f"operand{index}", base // granule, -(-nbytes // granule), index
            )
        )
        base += -(-max(nbytes, 1) // (1 << 20)) * (1 << 20)
    program.smem_words = next_free["smem"] // WORD_BYTES + (1 << 14)
    program.regions.sort(key=lambda r: (r.space, r.base))


def _branch_in(code: list[Instruction]) -> Instruction | None:
    branches = [i for i in code if i.opcode == "sbr.rel"]
    if len(branches) > 1:
        raise isa.UnsupportedInstruction("two branches in one bundle")
    return branches[0] if branches else None


def _delay_slots_of(chip: Chip | None, bundles, scalar_code) -> int:
    """Bundles executed after every branch, as the chip has it or the program shows."""
    if chip is not None and chip.name in core.BRANCH_DELAY_SLOTS:
        return core.BRANCH_DELAY_SLOTS[chip.name]
    return _infer_delay_slots(bundles, scalar_code)


def _infer_delay_slots(bundles, scalar_code) -> int:
    """Bundles executed after every branch: the shortest way from a branch to a join.

    Delay slots never contain the start of another region, and a loop's exit or
    header directly follows the delay slots of the branch before it.
    """
    joins = {b.address for b in bundles if b.marker in ("LB", "PF")}
    joins |= {
        i.branch_bundle
        for code in scalar_code
        for i in code
        if i.branch_bundle is not None
    }
    gaps, following = [], len(bundles)
    for address in range(len(bundles) - 1, -1, -1):
        if any(i.opcode == "sbr.rel" for i in scalar_code[address]):
            gaps.append(following - address - 1)
        if address in joins:
            following = address
    return min([*gaps, isa.MOST_BRANCH_DELAY_SLOTS])


def _delay_slots(program: Program, branch: int) -> int:
    if program.exact_delays:
        return program.branch_delay_slots
    # Some delay slots were folded away: they end where the next region starts.
    count = 0
    for position in range(
        branch + 1, min(branch + 1 + isa.MOST_BRANCH_DELAY_SLOTS, len(program.bundles))
    ):
        bundle = program.bundles[position]
        if bundle.marker or bundle.starts_regions:
            break
        count += 1
    return count


def _form_blocks(program: Program) -> None:
    region_start = {}
    for bundle in program.bundles:
        for region in bundle.starts_regions:
            region_start.setdefault(region, bundle.address)
    total = len(program.bundles)
    leaders = {0}
    targets = {}
    for address, code in enumerate(program.scalar_code):
        branch = _branch_in(code)
        if branch:
            if branch.branch_bundle is not None:
                target = branch.branch_bundle
            else:
                target = region_start.get(branch.branch_region, total)
            targets[address] = target
            leaders.add(target)
            leaders.add(address + _delay_slots(program, address) + 1)
    pending, blocks = [0], {}
    while pending:
        start = pending.pop()
        if start in blocks or start >= total:
            continue
        position, branch = start, None
        while position < total:
            if position in targets:
                branch = position
                end = min(position + 1 + _delay_slots(program, position), total)
                for slot in range(position + 1, end):
                    if slot in targets:
                        raise isa.UnsupportedInstruction(
                            f"branch in a delay slot at {slot:#x}"
                        )
                break
            position += 1
            if position in leaders:
                end = position
                break
        else:
            end = total
        if branch is None:
            successors = (end,) if end < total else (EXIT,)
        else:
            conditional = any(
                i.predicate
                for i in program.scalar_code[branch]
                if i.opcode == "sbr.rel"
            )
            taken = targets[branch] if targets[branch] < total else EXIT
            through = end if end < total else EXIT
            successors = (through, taken) if conditional else (taken, taken)
        blocks[start] = Block(start, end, successors, branch)
        pending.extend(s for s in successors if s != EXIT)
    program.blocks = dict(sorted(blocks.items()))


# --- code generation -------------------------------------------------------

# The low 32 bits of a number, as a signed one.
_WRAPPED = "(({} + 0x80000000 & 0xFFFFFFFF) - 0x80000000)"
_COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_LOGIC = {
    "pand": "({0} and {1})",
    "pnand": "(not ({0} and {1}))",
    "por": "({0} or {1})",
    "pnor": "(not ({0} or {1}))",
    "pneg": "(not {0})",
    "pxor": "({0} != {1})",
    "pmov": "{0}",
}


def _is_rename(ins: Instruction) -> bool:
    """Instructions that only give the same physical register another name."""
    if ins.opcode.startswith(("sphi", "int_to_ptr")):
        return True
    if (
        ins.opcode.startswith("smov")
        and ins.target
        and ins.operands
        and isinstance(ins.operands[0], Register)
    ):
        source = ins.operands[0]
        return (source.bank, source.number) == (ins.target.bank, ins.target.number)
    return False


def _memory_address(ins: Instruction) -> Address:
    address = ins.operands[0]
    if not isinstance(address, Address):
        raise isa.UnsupportedInstruction(ins.text)
    return address


class _Emitter:
    def __init__(self, program: Program):
        self.program = program

    def operand(self, value) -> str:
        if isinstance(value, Immediate):
            return str(value.value) if value.value >= 0 else f"({value.value})"
        if isinstance(value, Register):
            text = f"{value.bank}[{value.number}]"
            return f"(not {text})" if value.negated else text
        return self.address(value)

    def address(self, value: Address) -> str:
        constant = value.offset
        if value.allocation is not None:
            constant += self.program.allocation_base[value.allocation]
        terms = [f"s[{r.number}]" for r in value.registers]
        if constant or not terms:
            terms.append(str(constant))
        return " + ".join(terms)

    def load(self, value: Address) -> str:
        if value.registers:
            return f"load({self.address(value)})"
        return f"smem[{self.address(value)}]"

    def value(self, ins: Instruction) -> str | None:
        """Python expression for what the instruction writes to its target."""
        op, args = ins.opcode, [self.operand(a) for a in ins.operands]
        if ins.kernel_operand:
            index = ins.kernel_operand.index
            if ins.kernel_operand.space == "value":
                return f"scalar_operand({index})"
            unit = (
                self.program.hbm_pointer_granules
                if ins.kernel_operand.space == "hbm"
                else 1
            )
            return str(self.program.operand_base[index] // unit)
        if op.startswith("smov"):
            return args[0]
        if op == "spop.sfrf":
            return "sync_values.popleft()"
        if op == "sld":
            return self.load(_memory_address(ins))
        if op == "scalar_select":
            named = {k: self.operand(v) for k, v in ins.named.items()}
            return (
                f"({named['on_true']} if {named['predicate']} else {named['on_false']})"
            )
        if op.startswith("scalar_lea"):
            return " + ".join(args)
        if op.startswith("scmp."):
            _, relation, kind, *_ = op.split(".")
            if kind == "u32":
                args = [f"({a} & 0xFFFFFFFF)" for a in args]
            elif kind != "s32":
                return None
            return f"({args[0]} {_COMPARE[relation]} {args[1]})"
        if op in _LOGIC:
            return _LOGIC[op].format(*args)
        base, _, kind = op.partition(".")
        if kind == "f32":
            known = base in ("sadd", "ssub", "smul", "smax", "smin")
            return f"float32({base!r}, {args[0]}, {args[1]})" if known else None
        if base in ("sadd", "ssub", "smul"):
            sign = {"sadd": "+", "ssub": "-", "smul": "*"}[base]
            return _WRAPPED.format(f"({args[0]} {sign} {args[1]})")
        if base == "smulhi":
            return f"wrap((({args[0]} & 0xFFFFFFFF) * ({args[1]} & 0xFFFFFFFF)) >> 32)"
        if base == "sshll":
            return _WRAPPED.format(f"({args[0]} << ({args[1]} & 31))")
        if base == "sshra":
            return f"({args[0]} >> ({args[1]} & 31))"
        if base == "sshrl":
            return f"wrap(({args[0]} & 0xFFFFFFFF) >> ({args[1]} & 31))"
        if base == "sand":
            return f"({args[0]} & {args[1]})"
        if base == "sor":
            return f"({args[0]} | {args[1]})"
        if base == "sxor":
            return f"({args[0]} ^ {args[1]})"
        if base in ("smax", "smin"):
            return f"{base[1:]}({args[0]}, {args[1]})"
        return None

    def effect(self, ins: Instruction) -> str | None:
        """Python statement for an instruction without a target register."""
        op, named = ins.opcode, {k: self.operand(v) for k, v in ins.named.items()}
        first, second = ([self.operand(a) for a in ins.operands] + ["", ""])[:2]
        if op == "sst":
            return f"store({self.address(_memory_address(ins))}, {second})"
        if op in ("sfence", isa.NEVER):
            return "pass"
        if op == "dma.done.wait":
            return f"t = wait(t, {first}, {second})"
        if op == "vsyncmov":  # read back by a later spop.sfrf
            return f"sync_read(t, {first})"
        if op == "shalt.err":
            return f"halt({ins.comment[:160]!r})"
        if op == "vsyncadd":
            return f"sync_add(t, {first}, {second})"
        if op == "vsyncpa":
            return f"sync_set(t, {first}, {second})"
        if op.startswith("dma."):
            if op == "dma.general":
                direction = re.search(r"(\w+)-to-(\w+)", ins.comment)
                source, target = (
                    direction.groups() if direction else ("unknown", "unknown")
                )
                source_address, target_address = named["src"], named["dst"]
                steps = "0"
            else:
                source, target = op[4:].split("_to_")
                keys = [
                    k for k in ins.named if k in ("hbm", "vmem", "smem", "src", "dst")
                ]
                source_address, target_address = named[keys[0]], named[keys[-1]]
                steps = named.get("steps_per_stride", "0")
            return (
                f"dma(t, {source!r}, {source_address}, {target!r}, {target_address}, "
                f"{named['size_in_granules']}, {named['dst_syncflagno']}, {steps})"
            )
        return None

    def statement(self, ins: Instruction, temporary: str | None = None) -> list[str]:
        """Lines for one instruction; with `temporary`, the value goes there instead."""
        if ins.undecoded:
            return self._unsupported(ins)
        if ins.opcode == "sbr.rel":
            return [f"taken = {self._condition(ins)}"]
        if ins.target is not None:
            value = self.value(ins)
            register = f"{ins.target.bank}[{ins.target.number}]"
            if value is None:
                return self._unsupported(ins)
            if temporary:
                if ins.predicate:
                    old = ins.predicate.otherwise
                    old = register if old is None else self.operand(old)
                    value = f"{value} if {self._condition(ins)} else {old}"
                return [f"{temporary} = {value}"]
            if not ins.predicate:
                return [f"{register} = {value}"]
            lines = [f"if {self._condition(ins)}: {register} = {value}"]
            otherwise = ins.predicate.otherwise
            if otherwise is not None and self.operand(otherwise) != register:
                lines.append(f"else: {register} = {self.operand(otherwise)}")
            return lines
        effect = self.effect(ins)
        if effect is None:
            return self._unsupported(ins)
        if ins.predicate:
            return [f"if {self._condition(ins)}: {effect}"]
        return [effect]

    def _condition(self, ins: Instruction) -> str:
        if not ins.predicate:
            return "True"
        text = f"p[{ins.predicate.register.number}]"
        return text if ins.predicate.expected else f"not {text}"

    def _unsupported(self, ins: Instruction) -> list[str]:
        condition = self._condition(ins)
        return [f"if {condition}: unsupported({ins.text[:160]!r})"]

    def bundle(self, code: list[Instruction]) -> list[str]:
        """All of a bundle's instructions read registers before any writes them."""
        # Operands are in their registers before the first bundle, whose other
        # instructions may already reuse such a register.
        placed = [i for i in code if i.kernel_operand]
        pending = [i for i in code if not i.kernel_operand and not _is_rename(i)]
        ordered: list[Instruction] = []
        while pending:
            for ins in pending:
                others = [o for o in pending if o is not ins]
                clash = ins.target is not None and any(
                    r.bank == ins.target.bank and r.number == ins.target.number
                    for o in others
                    for r in o.reads()
                )
                clash |= ins.opcode == "sst" and any(o.opcode == "sld" for o in others)
                if not clash:
                    ordered.append(ins)
                    pending.remove(ins)
                    break
            else:
                break
        lines = [line for ins in placed + ordered for line in self.statement(ins)]
        writers = [(i, i.target) for i in pending if i.target is not None]
        for position, (ins, _) in enumerate(writers):
            lines += self.statement(ins, temporary=f"new{position}")
        for ins in pending:
            if ins.target is None:
                lines += self.statement(ins)
        for position, (_, target) in enumerate(writers):
            lines.append(f"{target.bank}[{target.number}] = new{position}")
        return lines


_TIMED = ("dma.", "vsync")


def _generate(program: Program) -> str:
    """Source of one function for each block, and of the table of them."""
    emitter = _Emitter(program)
    out = []
    for block in program.blocks.values():
        out.append(f"def block_{block.start}(t):")
        out.extend("    " + line for line in _block_body(program, emitter, block))
    table = ", ".join(f"{start}: block_{start}" for start in program.blocks)
    out.append(f"blocks = {{{table}}}")
    return "\n".join(out)


def _block_body(program: Program, emitter: _Emitter, block: Block) -> list[str]:
    body: list[str] = []
    counted = block.start  # bundles before this one are already in t
    for position in range(block.start, block.end):
        code = program.scalar_code[position]
        if not code:
            continue
        if any(i.opcode.startswith(_TIMED) for i in code):
            body += _advance(program, counted, position)
            counted = position
        body += emitter.bundle(code)
    body += _advance(program, counted, block.end)
    through, taken = block.successors * (1 if len(block.successors) == 2 else 2)
    if through == taken:
        body.append(f"return {taken}, t")
    else:
        body.append(f"return ({taken} if taken else {through}), t")
    return body


def _advance(program: Program, start: int, end: int) -> list[str]:
    """Code that lets the time of the bundles [start, end) pass."""
    if start == end:
        return []
    cycles = int(program.cycles_of_bundle[start:end].sum())
    issues = tuple(
        (int(program.cycles_of_bundle[start:k].sum()), m.mxu, m.dtype)
        for k in range(start, end)
        for m in program.matmuls[k]
    )
    if not issues:
        return [f"t += {cycles}"]
    program.stretches.append(MatmulStretch(cycles, issues))
    return [f"t = matmuls({len(program.stretches) - 1}, t)"]


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
                if _is_rename(ins):
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
                if _is_rename(ins):
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

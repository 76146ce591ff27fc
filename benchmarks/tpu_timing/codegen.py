"""Turns basic blocks into Python.

Each block becomes one function `block_<start>(t) -> (next_start, t)` that updates
scalar registers, predicates and SMEM, and calls the timing hooks of the machine for
DMA, sync flags and matmuls. Vector bundles cost only their cycles.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.tpu_timing import isa
from benchmarks.tpu_timing.control_flow import Block
from benchmarks.tpu_timing.isa import Address, Immediate, Instruction, Register
from benchmarks.tpu_timing.memory_map import MemoryMap

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
_INTEGERS = ("s32", "u32")
_TIMED = ("dma.", "vsync")


@dataclass(frozen=True)
class MatmulStretch:
    """Straight-line bundles between two timing events, with their matmuls.

    Attributes:
      cycles: Of the bundles.
      issues: Cycle, MXU and type of each matmul.
    """

    cycles: int
    issues: tuple[tuple[int, int, str], ...]


def generate(
    blocks: dict[int, Block],
    scalar_code: list[list[Instruction]],
    matmuls: list[list[isa.MatmulIssue]],
    memory: MemoryMap,
) -> tuple[str, list[MatmulStretch]]:
    """Writes one function for each block, and the table of them.

    Args:
      blocks: By their first bundle.
      scalar_code: Of each bundle.
      matmuls: Of each bundle.
      memory: The addresses that go into the source.

    Returns:
      The source, and the stretches that it refers to by number.
    """
    emitter = _Emitter(memory)
    out: list[str] = []
    stretches: list[MatmulStretch] = []

    def advance(start: int, end: int) -> list[str]:
        """Code that lets the time of the bundles [start, end) pass."""
        if start == end:
            return []
        issues = tuple(
            (position - start, matmul.mxu, matmul.dtype)
            for position in range(start, end)
            for matmul in matmuls[position]
        )
        if not issues:
            return [f"t += {end - start}"]
        stretches.append(MatmulStretch(end - start, issues))
        return [f"t = matmuls({len(stretches) - 1}, t)"]

    for block in blocks.values():
        out.append(f"def block_{block.start}(t):")
        body = _block_body(block, scalar_code, emitter, advance)
        out.extend("    " + line for line in body)
    table = ", ".join(f"{start}: block_{start}" for start in blocks)
    out.append(f"blocks = {{{table}}}")
    return "\n".join(out), stretches


def _block_body(
    block: Block,
    scalar_code: list[list[Instruction]],
    emitter: _Emitter,
    advance: Callable[[int, int], list[str]],
) -> list[str]:
    body: list[str] = []
    counted = block.start  # bundles before this one are already in t
    for position in range(block.start, block.end):
        code = scalar_code[position]
        if not code:
            continue
        if any(i.opcode.startswith(_TIMED) for i in code):
            body += advance(counted, position)
            counted = position
        body += emitter.bundle(code)
    body += advance(counted, block.end)
    through, taken = block.successors[0], block.successors[-1]
    if through == taken:
        body.append(f"return {taken}, t")
    else:
        body.append(f"return ({taken} if taken else {through}), t")
    return body


class _Emitter:
    """Python for instructions and bundles."""

    def __init__(self, memory: MemoryMap):
        self._memory = memory

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
            constant += self._memory.allocation_base[value.allocation]
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
            return str(self._memory.operand_register(ins.kernel_operand))
        if op.startswith("smov"):
            return args[0]
        if op in isa.READ_BACK:
            return "sync_values.popleft()"
        if op == isa.REMAINDER:
            return "remainders.popleft()"
        if op == isa.VECTOR_RESULT:
            return f"vector_result({ins.text[:160]!r})"
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
            if kind == "f32":
                return f"float32_is({relation!r}, {args[0]}, {args[1]})"
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
        if kind not in _INTEGERS:
            return None
        if base in ("sadd", "ssub", "smul"):
            sign = {"sadd": "+", "ssub": "-", "smul": "*"}[base]
            return _WRAPPED.format(f"({args[0]} {sign} {args[1]})")
        if base == "smulhi" and kind == "u32":
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
            if kind == "u32":  # of x and -x, the compiler's absolute value
                unsigned = ", ".join(f"{a} & 0xFFFFFFFF" for a in args)
                return f"wrap({base[1:]}({unsigned}))"
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
        if op == "vsyncmov":  # read back later, see READ_BACK
            return f"sync_read(t, {first})"
        if op == "sdivrem.u32" and ins.comment == "kRem":
            dividend, divisor = (f"({a} & 0xFFFFFFFF)" for a in (first, second))
            return f"remainders.append(wrap({dividend} % {divisor}))"
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
        pending = [i for i in code if not i.kernel_operand and not i.is_rename]
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


def _memory_address(ins: Instruction) -> Address:
    address = ins.operands[0]
    if not isinstance(address, Address):
        raise isa.UnsupportedInstruction(ins.text)
    return address

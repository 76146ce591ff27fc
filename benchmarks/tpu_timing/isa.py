"""Decodes scalar, branch, DMA and sync instructions of a bundle listing.

Vector instructions are not decoded, except that vmatmul is recognised so that
MXU occupancy can be modelled. Register operands carry their physical register
as a suffix (%s99337_s4 lives in s4, %p79591_p0 in p0).
"""

from __future__ import annotations

import math
import operator
import re
import struct
from dataclasses import dataclass, field

MOST_BRANCH_DELAY_SLOTS = 6  # 6 on TPU7x, 4 on v5e and v6e

_COMMENT = re.compile(r"/\* (.*?)\*/")
# Opcode of what the compiler itself knows to be skipped.
NEVER = "never"
# Opcodes that give the value of a sync flag; the second is libtpu 0.0.44's.
READ_BACK = ("spop.sfrf", "vpop.sfrf")
# Opcode that gives the remainder of the oldest division that was not read back yet.
REMAINDER = "spop.drf"
# Opcode that gives a value of the vector unit.
VECTOR_RESULT = "spop"
_PREDICATE = re.compile(r"\((!?)%p\d+_p(\d+)(?:,\s*([^)]*))?\)")
_NAMED_OPERAND = re.compile(r"/\*(\w+)=\*/\s*([^,]+)")
_REGISTER = re.compile(r"^(!?)%([sp])\d+_[sp](\d+)$")
_ALLOCATION = re.compile(r"#allocation(\d+)")
_SMEM = re.compile(r"^\[smem:\[(.*?)\]\]")
_SMEM_AND_VALUE = re.compile(r"^\[smem:\[(.*?)\]\]\s*,?\s*(?:/\*sx=\*/)?\s*(.+)$")
_FLOAT = re.compile(r"^-?\d+(\.\d*)?(e[+-]?\d+)?$")
_BRACKETS = re.compile(r"^\[(.*)\]$")
_VMATMUL = re.compile(
    r"\bvmatmul\.(?:mubr\.)?(?:msk\.)?([a-z]+[0-9]+\w*)\.[\w.\[\]]*?mxu(\d)"
)
_VMATMUL_UNTYPED = re.compile(r"\bvmatmul[\w.\[\]]*?mxu(\d)")
_OPERAND_SHAPE = re.compile(r"shape: (\w+)\[([\d,]*)\].*?index: (\d+), kind: (\w+)")
_MAY_ALIAS = re.compile(r"may-alias: \{(\d+),(\d+)\}")


class UnsupportedInstruction(Exception):
    """An instruction that the instrument cannot decode or execute."""


@dataclass(frozen=True)
class Register:
    """A scalar or predicate register, with the name it has at this place."""

    bank: str  # 's' or 'p'
    number: int
    name: str  # the full virtual name, e.g. %s99337_s4
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A constant."""

    value: int


@dataclass(frozen=True)
class Address:
    """Sum of an allocation's base, registers, and a constant."""

    allocation: int | None
    registers: tuple[Register, ...]
    offset: int


Operand = Register | Immediate | Address


@dataclass
class Predicate:
    """The condition of an instruction."""

    register: Register
    expected: bool
    otherwise: Operand | None = None  # value taken when the predicate fails


@dataclass
class KernelOperand:
    """A kernel operand whose address or value the entry places in a scalar register."""

    index: int
    dtype: str
    shape: tuple[int, ...]
    kind: str  # input or output
    alias: tuple[int, int] | None
    space: str  # hbm, vmem, smem; "value" if passed by value


@dataclass
class Instruction:
    """One decoded instruction of a bundle."""

    opcode: str
    target: Register | None
    operands: list[Operand] = field(default_factory=list)
    named: dict[str, Operand] = field(default_factory=dict)
    predicate: Predicate | None = None
    branch_bundle: int | None = None
    branch_region: int | None = None
    kernel_operand: KernelOperand | None = None
    comment: str = ""
    text: str = ""
    undecoded: bool = False  # operands not understood; may only be skipped

    @property
    def is_rename(self) -> bool:
        """Whether it only gives the same physical register another name."""
        if self.opcode.startswith(("sphi", "pphi", "int_to_ptr")):
            return True
        if not self.opcode.startswith("smov") or not self.operands:
            return False
        source, target = self.operands[0], self.target
        return (
            isinstance(source, Register)
            and target is not None
            and (source.bank, source.number) == (target.bank, target.number)
        )

    def reads(self) -> list[Register]:
        found: list[Register] = []
        values = list(self.operands) + list(self.named.values())
        if self.predicate:
            found.append(self.predicate.register)
            if self.predicate.otherwise is not None:
                values.append(self.predicate.otherwise)
        for value in values:
            if isinstance(value, Register):
                found.append(value)
            elif isinstance(value, Address):
                found.extend(value.registers)
        return found


@dataclass(frozen=True)
class MatmulIssue:
    """A vmatmul: the unit it occupies and the type in its mnemonic."""

    mxu: int
    dtype: str


def split_bundle(text: str) -> list[str]:
    return [part.strip() for part in text.split(" ;; ") if part.strip()]


def matmul_issues(text: str) -> list[MatmulIssue]:
    """The vmatmul instructions in a bundle's text."""
    if "vmatmul" not in text:
        return []
    issues = []
    for part in split_bundle(text):
        if "= vmatmul" not in part:
            continue
        typed = _VMATMUL.search(part)
        if typed:
            issues.append(MatmulIssue(int(typed.group(2)), typed.group(1)))
        else:
            issues.append(
                MatmulIssue(int(_found(_VMATMUL_UNTYPED, part).group(1)), "f32")
            )
    return issues


def is_vector(part: str) -> bool:
    """True for instructions whose only effects are on vector state."""
    target, _, rest = part.partition(" = ")
    if target.startswith("%v"):
        return True
    if target.startswith(("%s", "%p")):
        return False
    opcode = rest.split(" ", 1)[0]
    return opcode.startswith("v") and not opcode.startswith("vsync")


def signed32(value: int) -> int:
    return ((value + 0x80000000) & 0xFFFFFFFF) - 0x80000000


def float32_bits(value: float) -> int:
    """The bits of a number in a scalar register, rounded to float32."""
    try:
        return struct.unpack("<i", struct.pack("<f", value))[0]
    except OverflowError:
        return struct.unpack("<i", struct.pack("<f", math.copysign(math.inf, value)))[0]


def float32_value(bits: int) -> float:
    """Inverse of ``float32_bits``."""
    return struct.unpack("<f", struct.pack("<i", bits))[0]


def float32_comparison(relation: str, left: int, right: int) -> bool:
    """Whether lt, le, gt, ge, eq or ne holds between float32 bits."""
    compare = getattr(operator, relation)
    return compare(float32_value(left), float32_value(right))


def float32_arithmetic(operation: str, left: int, right: int) -> int:
    """Result of sadd, ssub, smul, smax or smin on float32 bits, as bits."""
    operate = {
        "sadd": operator.add,
        "ssub": operator.sub,
        "smul": operator.mul,
        "smax": max,
        "smin": min,
    }[operation]
    return float32_bits(operate(float32_value(left), float32_value(right)))


def parse_operand(text: str) -> Operand:
    text = text.strip()
    match = _REGISTER.match(text)
    if match:
        return Register(
            match.group(2), int(match.group(3)), text.lstrip("!"), bool(match.group(1))
        )
    match = _BRACKETS.match(text)
    if match:
        return parse_address(match.group(1))
    if re.fullmatch(r"-?\d+", text) or text.startswith("0x"):
        return Immediate(signed32(int(text, 0)))
    if _FLOAT.match(text):
        return Immediate(float32_bits(float(text)))
    if text.startswith("#allocation"):
        return parse_address(text)
    raise UnsupportedInstruction(f"operand {text!r}")


def parse_address(text: str) -> Address:
    allocation, registers, offset = None, [], 0
    for term in text.split(" + "):
        term = term.strip()
        if term.startswith("#allocation"):
            allocation = int(_found(_ALLOCATION, term).group(1))
        elif term.startswith("%"):
            register = parse_operand(term)
            registers.append(register)
        elif term.startswith("$"):
            offset += int(term[1:], 0)
        elif re.fullmatch(r"-?\d+|0x[0-9a-f]+", term):
            offset += int(term, 0)
        else:
            raise UnsupportedInstruction(f"address term {term!r} in {text!r}")
    return Address(allocation, tuple(registers), offset)


def _found(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    match = pattern.search(text)
    if match is None:
        raise UnsupportedInstruction(text)
    return match


def _target(text: str) -> Register | None:
    match = _REGISTER.match(text)
    return Register(match.group(2), int(match.group(3)), text) if match else None


def parse_instruction(part: str) -> Instruction:
    """Decodes one instruction; one with unknown operands comes back undecoded."""
    try:
        return _parse(part)
    except UnsupportedInstruction:
        target_text, _, rest = part.partition(" = ")
        target = _target(target_text)
        return Instruction(rest.split(" ", 1)[0], target, text=part, undecoded=True)


def _parse(part: str) -> Instruction:
    comment = " ".join(c.strip() for c in _COMMENT.findall(part))
    text = _COMMENT.sub("", part).strip()
    target_text, _, rest = text.partition(" = ")
    opcode, _, args = rest.partition(" ")
    if args.startswith("(0)"):  # a predicate that the compiler found to be false
        return Instruction(NEVER, None, comment=comment, text=part)
    instruction = Instruction(opcode, _target(target_text), comment=comment, text=part)

    if opcode.startswith("inlined_call_operand"):
        dtype, shape, index, kind = _found(_OPERAND_SHAPE, args).groups()
        alias = _MAY_ALIAS.search(args)
        instruction.kernel_operand = KernelOperand(
            int(index),
            dtype,
            tuple(int(n) for n in shape.split(",") if n),
            kind,
            (int(alias.group(1)), int(alias.group(2))) if alias else None,
            space="value" if "<no" in opcode else opcode.split(".")[1],
        )
        return instruction
    if opcode in (*READ_BACK, REMAINDER, VECTOR_RESULT, "shalt.err"):
        predicate = _PREDICATE.search(args)
        if predicate:
            negated, number, _ = predicate.groups()
            instruction.predicate = Predicate(
                Register("p", int(number), predicate.group(0).strip("()").lstrip("!")),
                not negated,
            )
        return instruction
    if opcode in ("sphi", "pphi") or opcode.startswith("int_to_ptr"):
        args = re.sub(r"\[resolvable:\S+\]", "", args)
        instruction.operands = [parse_operand(a) for a in args.split(",")]
        return instruction

    predicate = _PREDICATE.search(args)
    if predicate:
        args = (args[: predicate.start()] + args[predicate.end() :]).strip()
        negated, number, otherwise = predicate.groups()
        name = predicate.group(0).strip("()").split(",")[0].lstrip("!")
        instruction.predicate = Predicate(
            Register("p", int(number), name),
            expected=not negated,
            otherwise=parse_operand(otherwise) if otherwise else None,
        )
    args = args.lstrip(", ")

    if opcode == "sbr.rel":
        bundle = re.search(r"target bundleno = (\d+)", args)
        region = re.search(r"target = \$region(\d+)|region = (\d+)", args)
        if bundle:
            instruction.branch_bundle = int(bundle.group(1))
        if region:
            instruction.branch_region = int(region.group(1) or region.group(2))
    elif opcode == "sld":
        match = _found(_SMEM, args)
        instruction.operands = [parse_address(match.group(1))]
    elif opcode == "sst":
        match = _found(_SMEM_AND_VALUE, args)
        instruction.operands = [
            parse_address(match.group(1)),
            parse_operand(match.group(2)),
        ]
    elif (
        opcode.startswith("dma.") and opcode != "dma.done.wait"
    ) or opcode == "scalar_select":
        args = re.sub(r"\[thread:\S+\]", "", args)
        instruction.named = {
            k: parse_operand(v) for k, v in _NAMED_OPERAND.findall(args)
        }
    elif args:
        if opcode.startswith("scalar_lea"):  # drop the trailing allocation annotation
            args = re.sub(r"(?<=[\w\]])\s+\[#allocation[^\]]*\]$", "", args)
        instruction.operands = [parse_operand(a) for a in args.split(",")]
    return instruction

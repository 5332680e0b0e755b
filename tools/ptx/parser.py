"""PTX text -> kernels: parameters, registers, shared variables, instructions with their operands, labels.

Reads what Triton's LLVM back end writes (one or more entries, inline assembly included); debug sections are dropped.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

SIZES = {  # bytes of one element of each fundamental type; .pred is not in memory
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    "f16": 2,
    "bf16": 2,
    "f16x2": 4,
    "f32": 4,
    "f64": 8,
}


class PtxSyntaxError(ValueError):
    """Text that this parser does not understand; names the line."""


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Special:
    """A read-only register of the hardware, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A literal: an integer's value, or the bits of a float and how many of them there are."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Symbol:
    """A shared variable or a parameter, by name."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | None
    offset: int


@dataclass(frozen=True)
class Vector:
    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """Two destinations written `d|p`."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Not:
    """A negated predicate."""

    register: Register


@dataclass(frozen=True)
class Sink:
    """`_`: a destination whose value nobody wants."""


Operand = Register | Special | Immediate | Symbol | Address | Vector | Pair | Not | Sink


@dataclass(frozen=True)
class Instruction:
    line: int
    text: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | Not | None

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    is_pointer: bool


@dataclass(frozen=True)
class Variable:
    """A variable in shared memory; `size` None: as large as the launch asks for (.extern)."""

    name: str
    space: str
    align: int
    size: int | None


@dataclass
class Kernel:
    name: str
    target: str
    parameters: list[Parameter] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)  # name, or family before its number -> type
    labels: dict[str, int] = field(default_factory=dict)  # -> index of the next instruction
    instructions: list[Instruction] = field(default_factory=list)
    num_threads: int | None = None  # .reqntid

    def register_type(self, name: str) -> str | None:
        return self.registers.get(name) or self.registers.get(name.rstrip("0123456789") + "<>")


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)(\s+\.ptr\b[^,]*?)?\s+([\w$]+)\s*(?:\[\d*\])?\s*$")
_VARIABLE = re.compile(r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?\s*$")
_REGISTER = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$", re.DOTALL)
_STATEMENT = re.compile(r"(?P<label>[\w$]+):(?!:)|(?P<line>\.(?:loc|file)\b[^\n]*)|(?P<brace>[{}])")
_GUARD = re.compile(r"@(!?)([%\w$]+)\s+")
_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
_SPECIAL = re.compile(r"%(?:(?:tid|ntid|ctaid|nctaid)\.[xyz]|laneid|warpid|lanemask_\w+)$")


def parse(ptx: str) -> dict[str, Kernel]:
    """The kernels (entries) of a module, by name."""
    text = _COMMENT.sub(lambda match: "\n" * match[0].count("\n"), ptx)
    target = re.search(r"\.target\s+(\w+)", text)
    kernels = {}
    entries = list(_ENTRY.finditer(text))
    module_end = entries[0].start() if entries else 0
    shared = [
        variable for statement in text[:module_end].split(";") if (variable := _variable(statement.split("\n")[-1]))
    ]
    for entry in entries:
        kernel = Kernel(entry[1], target[1] if target else "", variables=list(shared))
        for parameter in filter(None, (part.strip() for part in entry[2].split(","))):
            match = _PARAMETER.match(parameter)
            if not match:
                raise PtxSyntaxError(f"parameter {parameter!r} of {kernel.name}")
            kernel.parameters.append(Parameter(match[3], match[1], bool(match[2])))
        if threads := re.search(r"\.(?:reqntid|maxntid)\s+([\d,\s]+)", entry[3]):
            kernel.num_threads = 1
            for extent in threads[1].split(","):
                kernel.num_threads *= int(extent)
        _Body(kernel, text, entry.end()).read()
        kernels[kernel.name] = kernel
    return kernels


def _variable(declaration: str) -> Variable | None:
    match = _VARIABLE.search(declaration.strip())
    if not match:
        return None
    space, align, kind, name, count = match.groups()
    size = None if count == "" else SIZES[kind] * int(count or 1)
    return Variable(name, space, int(align or SIZES[kind]), size)


class _Body:
    """Reads the statements between an entry's braces; inner braces open a scope for registers."""

    def __init__(self, kernel: Kernel, text: str, start: int) -> None:
        self.kernel, self.text, self.position = kernel, text, start
        self.line, self.counted = text.count("\n", 0, start) + 1, start
        self.scopes: list[dict[str, str]] = [{}]
        self.scope_count = 0

    def read(self) -> None:
        while True:
            self._skip_blank()
            if self.position >= len(self.text):
                raise PtxSyntaxError(f"{self.kernel.name} has no closing brace")
            if match := _STATEMENT.match(self.text, self.position):
                self.position = match.end()
                if match["label"]:
                    self.kernel.labels[match["label"]] = len(self.kernel.instructions)
                elif match["brace"] == "{":
                    self.scopes.append({})
                    self.scope_count += 1
                elif match["brace"] == "}":
                    self.scopes.pop()
                    if not self.scopes:
                        return
                continue
            end = self.text.find(";", self.position)
            if end < 0:
                raise PtxSyntaxError(
                    f"line {self.line}: no ';' after {self.text[self.position : self.position + 40]!r}"
                )
            line = self.line
            statement = " ".join(self.text[self.position : end].split())
            self.position = end + 1
            if statement.startswith("."):
                self._directive(statement, line)
            elif statement:
                self.kernel.instructions.append(self._instruction(statement, line))

    def _skip_blank(self) -> None:
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1
        self.line += self.text.count("\n", self.counted, self.position)
        self.counted = self.position

    def _directive(self, statement: str, line: int) -> None:
        if match := _REGISTER.match(statement):
            for name in match[2].split(","):
                family, bracket, _ = name.strip().partition("<")
                unique = family if len(self.scopes) == 1 else f"{family}@{self.scope_count}."
                self.scopes[-1][family] = unique
                self.kernel.registers[unique + ("<>" if bracket else "")] = match[1]
        elif variable := _variable(statement):
            self.kernel.variables.append(variable)
        elif not statement.startswith(".pragma"):
            raise PtxSyntaxError(f"line {line}: {statement}")

    def _instruction(self, statement: str, line: int) -> Instruction:
        guard: Register | Not | None = None
        body = statement
        if match := _GUARD.match(statement):
            register = self._register(match[2])
            guard = Not(register) if match[1] else register
            body = statement[match.end() :]
        mnemonic, _, rest = body.partition(" ")
        opcode, *modifiers = mnemonic.split(".")
        # A cache hint such as L1::evict_last holds no dot, so splitting at dots leaves it whole.
        try:
            operands = tuple(self._operand(part) for part in _split(rest))
        except ValueError as error:
            raise PtxSyntaxError(f"line {line}: {statement}: {error}") from error
        return Instruction(line, statement, opcode, tuple(modifiers), operands, guard)

    def _register(self, name: str) -> Register:
        for scope in reversed(self.scopes):
            if name in scope:
                return Register(scope[name])
            family = name.rstrip("0123456789")
            if family in scope:
                return Register(scope[family] + name[len(family) :])
        raise ValueError(f"{name} is not declared")

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1].strip())
        if text.startswith("!"):
            return Not(self._register(text[1:]))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first), self._operand(second))
        if text.startswith(("0f", "0F")):
            return Immediate(int(text[2:], 16), 32)
        if text.startswith(("0d", "0D")):
            return Immediate(int(text[2:], 16), 64)
        if _INTEGER.match(text):
            return Immediate(int(text.rstrip("U"), 0))
        if re.match(r"-?\d+\.\d*(?:[eE][-+]?\d+)?$", text):
            return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 64)
        if _SPECIAL.match(text):
            return Special(text)
        try:
            return self._register(text)
        except ValueError:
            if re.match(r"[A-Za-z_$][\w$]*$", text):
                return Symbol(text)
            raise

    def _address(self, text: str) -> Address:
        match = re.match(r"([%\w$]*?)\s*(?:([+-])\s*(-?\w+))?$", text)
        if not match:
            raise ValueError(f"address [{text}]")
        name, sign, offset = match.groups()
        distance = int(offset, 0) * (-1 if sign == "-" else 1) if offset else 0
        if not name:
            return Address(None, distance)
        base = self._operand(name)
        if isinstance(base, Immediate):
            return Address(None, base.value + distance)
        if not isinstance(base, Register | Symbol):
            raise ValueError(f"address [{text}]")
        return Address(base, distance)


def _split(operands: str) -> list[str]:
    """Splits at the commas outside braces and brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(operands):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(operands[start:i])
            start = i + 1
    if operands[start:].strip():
        parts.append(operands[start:])
    return parts

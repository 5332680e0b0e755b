"""The loops of a kernel's machine code (SASS), and how many cycles each unit of a Turing sub-core needs for them.

An SM of Turing has four sub-cores, each with its own issue port, tensor cores, FP32, ALU and special-function units;
the four share one shared memory. All bounds are cycles that one warp needs of a unit for one iteration; shared memory's
are for four warps, one a sub-core. The largest is a lower bound of the iteration's time: what a perfect overlap would
leave.

Rates, for a T4: HMMA.1688 is 1024 multiply-adds at 128 a cycle; IMMA.8816 twice as fast; FP32, IMAD and ALU
instructions take 16 lanes two cycles, special functions and conversions between float widths (F2F) 4 lanes eight;
shared memory gives 64 bytes a cycle, half of Volta's: each of its 32 banks 4 bytes every second cycle (Jia et al.,
Dissecting the NVidia Turing T4 GPU via Microbenchmarking, arXiv 1903.07486; shuffles, which use its data path, are not
counted). GeForce cards accumulate HMMA in fp32 at half the rate.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping

from tools.offline.control import Control, decode

UNITS = ("tensor", "fp32", "alu", "mufu", "shared", "issue")
SUB_CORES = 4
LANES = 32
SHARED_BYTES = 64  # a cycle, of an SM's shared memory
_TENSOR = {"HMMA.1688": 8, "IMMA.8816": 4}
_FP32 = {"FADD", "FFMA", "FMUL", "IMAD"}
_ALU = {
    *("BMSK", "BREV", "FLO", "FMNMX", "FSEL", "FSET", "FSETP", "IABS", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "MOV"),
    *("PLOP3", "PRMT", "SEL", "SGXT", "SHF", "VABSDIFF"),
}
_MUFU = {"F2F", "F2I", "FRND", "I2F", "MUFU", "POPC"}
_SHARED = {"ATOMS", "LDS", "LDSM", "STS"}

_LABEL = re.compile(r"^\.(L\w+):")
_INSTRUCTION = re.compile(
    r"^\s*(?:/\*[0-9a-f]{4,}\*/)?\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_]*)(?P<modifiers>(?:\.\w+)*)"
    r"(?P<operands>\s[^;]*)?;"
)
_UPPER = re.compile(r"^\s*/\* 0x(?P<upper>[0-9a-f]{16}) \*/\s*$")
_TARGET = re.compile(r"\(\.(L\w+)\)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    opcode: str  # "HMMA"
    modifiers: str  # ".1688.F32"
    operands: str
    control: Control | None = None  # where the text has the encoding

    @property
    def cycles(self) -> tuple[str, int] | None:
        """The unit that executes it and the cycles it takes there; None if only its issue counts."""
        full = self.opcode + self.modifiers
        for prefix, cycles in _TENSOR.items():
            if full.startswith(prefix):
                return "tensor", cycles
        if self.opcode in _FP32:
            return "fp32", 2
        if self.opcode in _ALU:
            return "alu", 2
        if self.opcode in _MUFU:
            return "mufu", 8
        if self.opcode in _SHARED:
            return "shared", SUB_CORES * self.words * LANES * 4 // SHARED_BYTES
        return None

    @property
    def words(self) -> int:
        """Words of 4 bytes a lane that it moves between registers and a memory."""
        if self.opcode == "LDSM":
            return int(self.modifiers[-1]) if self.modifiers[-1] in "24" else 1
        return 4 if ".128" in self.modifiers else 2 if ".64" in self.modifiers else 1


@dataclasses.dataclass(frozen=True)
class Loop:
    """The instructions from a label to the branch back to it; what a branch inside skips is counted as executed."""

    instructions: tuple[Instruction, ...]

    @property
    def counts(self) -> collections.Counter[str]:
        return collections.Counter(instruction.opcode for instruction in self.instructions)

    @property
    def bounds(self) -> Mapping[str, int]:
        """Cycles of each unit for one iteration of one warp."""
        cycles = dict.fromkeys(UNITS, 0)
        cycles["issue"] = len(self.instructions)
        for instruction in self.instructions:
            if found := instruction.cycles:
                cycles[found[0]] += found[1]
        return cycles

    @property
    def dot_instructions(self) -> int:
        """Multiply-adds, on tensor cores or not."""
        return sum(self.counts[opcode] for opcode in ("HMMA", "IMMA", "FFMA"))


def inner_loops(sass: str) -> list[Loop]:
    """The loops of a kernel that contain no other loop, in the order of the code.

    `sass` is what nvdisasm prints of a cubin, with the encoding (-hex) or without. The endless branch that ends a
    kernel is no loop.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.split("\n"):
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            instructions.append(Instruction(match["opcode"], match["modifiers"], match["operands"] or ""))
        elif (encoding := _UPPER.match(line)) and instructions:
            instructions[-1] = dataclasses.replace(instructions[-1], control=decode(int(encoding["upper"], 16)))
    spans = list(_backward(instructions, labels))
    inner = [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]
    return [Loop(tuple(instructions[first : last + 1])) for first, last in inner]


def _backward(instructions: list[Instruction], labels: dict[str, int]) -> Iterator[tuple[int, int]]:
    """(first, last) instruction of every loop; of several branches to one label, the last."""
    ends: dict[int, int] = {}
    for i, instruction in enumerate(instructions):
        target = _TARGET.search(instruction.operands) if instruction.opcode == "BRA" else None
        if target and labels.get(target[1], i) < i:
            ends[labels[target[1]]] = i
    yield from sorted(ends.items())

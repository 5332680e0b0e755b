"""The table of instructions: opcode -> a function that turns one instruction into something to execute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .arrays import Mask
from .faults import UnknownInstructionError
from .parser import Instruction
from .registers import DTYPES, Registers

if TYPE_CHECKING:
    from .counters import Counters
    from .memory import Memory

Execute = Callable[[Mask], None]


@dataclass
class Context:
    """What an instruction may touch."""

    registers: Registers
    memory: Memory
    counters: Counters


Definition = Callable[[Instruction, Context], Execute]
DEFINITIONS: dict[str, Definition] = {}


def defines(*opcodes: str) -> Callable[[Definition], Definition]:
    def register(definition: Definition) -> Definition:
        for opcode in opcodes:
            DEFINITIONS[opcode] = definition
        return definition

    return register


def decode(instruction: Instruction, context: Context) -> Execute:
    if instruction.opcode not in DEFINITIONS:
        raise UnknownInstructionError(f"{instruction.name} is not defined")
    return DEFINITIONS[instruction.opcode](instruction, context)


def split(instruction: Instruction, *allowed: str) -> tuple[list[str], set[str]]:
    """The types among the instruction's modifiers, in order, and the other modifiers, which must be among `allowed`.

    So a modifier that a definition does not know is an error, and never silently without effect.
    """
    kinds = [modifier for modifier in instruction.modifiers if modifier in DTYPES]
    flags = {modifier for modifier in instruction.modifiers if modifier not in DTYPES}
    if unknown := flags - set(allowed):
        raise UnknownInstructionError(f"{instruction.name}: no definition for .{', .'.join(sorted(unknown))}")
    return kinds, flags


def unsupported(instruction: Instruction) -> UnknownInstructionError:
    return UnknownInstructionError(f"{instruction.name} is not defined for these types")

"""What works on every element by itself: sources to target, and the flags of floats."""

from __future__ import annotations

from collections.abc import Callable

from .arrays import Array
from .definitions import Context, Execute, unsupported
from .parser import Instruction
from .rounding import canonical, flush, saturate

ROUNDINGS = ("rn", "rz", "rm", "rp")
FLOATS = ("f16", "f16x2", "f32", "f64")


def rounding_of(flags: set[str]) -> str:
    return next((mode for mode in ROUNDINGS if mode in flags), "rn")


def elementwise(
    instruction: Instruction, context: Context, function: Callable[..., Array], target: str, sources: list[str]
) -> Execute:
    """target register = function(source registers)."""
    if len(instruction.operands) != 1 + len(sources):
        raise unsupported(instruction)
    arrays = [
        context.registers.source(operand, kind) for operand, kind in zip(instruction.operands[1:], sources, strict=True)
    ]
    write = context.registers.target(instruction.operands[0], target)
    return lambda mask: write(function(*arrays), mask)


def float_function(function: Callable[..., Array], flags: set[str]) -> Callable[..., Array]:
    """`function` with what .ftz and .sat add, and NaN results made canonical."""

    def run(*sources: Array) -> Array:
        if "ftz" in flags:
            sources = tuple(flush(source) for source in sources)
        value = function(*sources)
        if "ftz" in flags:
            value = flush(value)
        return canonical(saturate(value) if "sat" in flags else value)

    return run

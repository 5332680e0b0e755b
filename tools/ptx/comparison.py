"""Comparison and selection, thread by thread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arrays import Array, Mask
from .definitions import Context, Execute, defines, split, unsupported
from .elementwise import FLOATS, elementwise
from .parser import Instruction, Pair
from .registers import DTYPES
from .rounding import flush

_ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_COMBINATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
}  # fmt: skip


def _comparison(name: str, kind: str) -> Callable[[Array, Array], Array]:
    if kind not in FLOATS:
        return _ORDERED[_UNSIGNED.get(name, name)]
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "ne":  # NumPy's is true for NaN, PTX's ordered one is not
        return lambda a, b: (a < b) | (a > b)
    if name in _ORDERED:
        return _ORDERED[name]
    ordered = _comparison(name[:-1], kind)  # equ, neu, ...: true also where a or b is NaN
    return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)


def _compared(
    instruction: Instruction, context: Context, kind: str, flags: set[str]
) -> Callable[[], tuple[Array, Array]]:
    """A function that gives the comparison and its negation, both combined with the third source where there is one."""
    names = flags - {"ftz", *_COMBINATIONS}
    if len(names) != 1 or kind == "f16x2" or (kind not in FLOATS and not names <= {*_ORDERED, *_UNSIGNED}):
        raise unsupported(instruction)
    compare = _comparison(names.pop(), kind)
    combinations = [_COMBINATIONS[flag] for flag in flags if flag in _COMBINATIONS]
    if len(instruction.operands) != 3 + len(combinations):
        raise unsupported(instruction)
    a, b = (context.registers.source(operand, kind) for operand in instruction.operands[1:3])
    others = [context.registers.predicate(operand) for operand in instruction.operands[3:]]

    def run() -> tuple[Array, Array]:
        holds = compare(flush(a), flush(b)) if "ftz" in flags else compare(a, b)
        both = holds, ~holds
        for combine, other in zip(combinations, others, strict=True):
            both = combine(both[0], other()), combine(both[1], other())
        return both

    return run


_COMPARISONS = {*_ORDERED, *_UNSIGNED, *(f"{name}u" for name in _ORDERED), "num", "nan"}


@defines("setp")
def _set_predicate(instruction: Instruction, context: Context) -> Execute:
    (kind,), flags = split(instruction, "ftz", *_COMPARISONS, *_COMBINATIONS)
    compared = _compared(instruction, context, kind, flags)
    target = instruction.operands[0]
    targets = (target.first, target.second) if isinstance(target, Pair) else (target,)
    writes = [context.registers.target(each, "pred") for each in targets]

    def run(mask: Mask) -> None:
        for write, value in zip(writes, compared(), strict=False):  # the negation only where it is asked for
            write(value, mask)

    return run


@defines("set")
def _set(instruction: Instruction, context: Context) -> Execute:
    (result, kind), flags = split(instruction, "ftz", *_COMPARISONS, *_COMBINATIONS)
    if result not in ("u32", "s32", "f32"):
        raise unsupported(instruction)
    compared = _compared(instruction, context, kind, flags)
    write = context.registers.target(instruction.operands[0], result)
    true = np.array(1.0 if result == "f32" else -1).astype(DTYPES[result])
    return lambda mask: write(np.where(compared()[0], true, np.zeros_like(true)), mask)


@defines("selp")
def _select(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)
    a, b = (context.registers.source(operand, kind) for operand in instruction.operands[1:3])
    condition = context.registers.predicate(instruction.operands[3])
    write = context.registers.target(instruction.operands[0], kind)
    return lambda mask: write(np.where(condition(), a, b), mask)


@defines("testp")
def _test(instruction: Instruction, context: Context) -> Execute:
    (kind,), flags = split(instruction, "finite", "infinite", "number", "notanumber", "normal", "subnormal")
    smallest = np.finfo(np.dtype(DTYPES[kind]).name).smallest_normal
    tests: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda a: ~np.isnan(a), "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= smallest),
        "subnormal": lambda a: (np.abs(a) < smallest) & (a != 0),
    }  # fmt: skip
    return elementwise(instruction, context, tests[flags.pop()], "pred", [kind])

"""Integer and float arithmetic, comparison and selection, bits: everything that works thread by thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .definitions import Context, Execute, defines, split, unsupported
from .parser import Immediate, Instruction, Pair, Vector
from .registers import DTYPES, Array, Mask
from .rounding import (
    canonical,
    flush,
    multiply_add_float32,
    round_float,
    saturate,
    sum_to_odd,
)

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


def float_function(function: Callable[..., Array], flags: set[str], *, flushes: bool = True) -> Callable[..., Array]:
    """`function` with what .ftz and .sat add, and NaN results made canonical."""

    def run(*sources: Array) -> Array:
        if "ftz" in flags and flushes:
            sources = tuple(flush(source) for source in sources)
        value = function(*sources)
        if "ftz" in flags and flushes:
            value = flush(value)
        return canonical(saturate(value) if "sat" in flags else value)

    return run


# Addition, multiplication


def _add(a: Array, b: Array, mode: str) -> Array:
    if mode == "rn" or a.dtype == np.float64:
        return a + b
    x, y = a.astype(np.float64), b.astype(np.float64)
    return round_float(_signed_zero(sum_to_odd(x, y), x, y, mode), a.dtype, mode)


def _signed_zero(total: Array, a: Array, b: Array, mode: str) -> Array:
    """A sum a + b that cancels is +0, but -0 when rounding down."""
    cancels = (mode == "rm") & (total == 0) & (np.signbit(a) != np.signbit(b))
    return np.where(cancels, -0.0, total)


def _multiply(a: Array, b: Array, mode: str) -> Array:
    if mode == "rn" or a.dtype == np.float64:
        return a * b
    return round_float(a.astype(np.float64) * b.astype(np.float64), a.dtype, mode)


def _fused(a: Array, b: Array, c: Array, mode: str) -> Array:
    if a.dtype == np.float32 and mode == "rn":
        return multiply_add_float32(a, b, c)
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    return round_float(_signed_zero(sum_to_odd(product, addend), product, addend, mode), a.dtype, mode)


def _saturating(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    def run(a: Array, b: Array) -> Array:
        return np.clip(function(a.astype(np.int64), b.astype(np.int64)), -(2**31), 2**31 - 1).astype(np.int32)

    return run


@defines("add", "sub")
def _addition(instruction: Instruction, context: Context) -> Execute:
    (kind,), flags = split(instruction, "ftz", "sat", *ROUNDINGS)
    sign = -1 if instruction.opcode == "sub" else 1
    if kind in FLOATS:
        mode = rounding_of(flags)
        if kind == "f64" and mode != "rn":
            raise unsupported(instruction)
        function = float_function(lambda a, b: _add(a, b if sign > 0 else -b, mode), flags)
    else:
        function = np.add if sign > 0 else np.subtract
        if "sat" in flags:
            if kind != "s32":
                raise unsupported(instruction)
            function = _saturating(function)
    return elementwise(instruction, context, function, kind, [kind, kind])


def _high(a: Array, b: Array) -> Array:
    """The upper half of the product, 32 or 64 bits wide."""
    if a.dtype.itemsize <= 4:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        return (a.astype(wide) * b.astype(wide) >> wide.type(8 * a.dtype.itemsize)).astype(a.dtype)
    exact = [int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)]
    return np.array([value & (2**64 - 1) for value in exact], np.uint64).view(a.dtype)


def _integer_product(instruction: Instruction, kind: str, flags: set[str]) -> tuple[Callable[..., Array], str]:
    """What mul and mad do to two integers, and the type of its result."""
    if "wide" in flags:
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        if wide not in DTYPES:
            raise unsupported(instruction)
        return lambda a, b: a.astype(DTYPES[wide]) * b.astype(DTYPES[wide]), wide
    if "hi" in flags:
        return _high, kind
    if "lo" in flags:
        return np.multiply, kind
    raise unsupported(instruction)


@defines("mul")
def _multiplication(instruction: Instruction, context: Context) -> Execute:
    (kind,), flags = split(instruction, "ftz", "sat", "lo", "hi", "wide", *ROUNDINGS)
    if kind in FLOATS:
        mode = rounding_of(flags)
        if kind == "f64" and mode != "rn":
            raise unsupported(instruction)
        function, result = float_function(lambda a, b: _multiply(a, b, mode), flags), kind
    else:
        function, result = _integer_product(instruction, kind, flags - {"sat"})
    return elementwise(instruction, context, function, result, [kind, kind])


@defines("fma", "mad")
def _multiply_add(instruction: Instruction, context: Context) -> Execute:
    (kind,), flags = split(instruction, "ftz", "sat", "lo", "hi", "wide", *ROUNDINGS)
    if kind in FLOATS:
        if kind == "f64":
            raise unsupported(instruction)
        mode = rounding_of(flags)
        function = float_function(lambda a, b, c: _fused(a, b, c, mode), flags)
        return elementwise(instruction, context, function, kind, [kind] * 3)
    if "sat" in flags:
        raise unsupported(instruction)
    product, result = _integer_product(instruction, kind, flags)
    return elementwise(instruction, context, lambda a, b, c: product(a, b) + c, result, [kind, kind, result])


@defines("sad")
def _absolute_difference(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)
    return elementwise(instruction, context, lambda a, b, c: np.maximum(a, b) - np.minimum(a, b) + c, kind, [kind] * 3)


@defines("dp4a")
def _dot_of_bytes(instruction: Instruction, context: Context) -> Execute:
    kinds, _ = split(instruction)
    if len(kinds) != 2:
        raise unsupported(instruction)
    lanes = [DTYPES[f"{kind[0]}8"] for kind in kinds]
    result = "s32" if "s32" in kinds else "u32"

    def function(a: Array, b: Array, c: Array) -> Array:
        products = a.view(lanes[0]).astype(np.int64) * b.view(lanes[1]).astype(np.int64)
        return (products.reshape(-1, 4).sum(1) + c.astype(np.int64)).astype(DTYPES[result])

    return elementwise(instruction, context, function, result, [*kinds, result])


# Division. `approx` and `full` are in approximate.py.


def _integer_quotient(a: Array, b: Array) -> Array:
    """Truncated towards zero; division by zero, which PTX leaves open, gives all ones."""
    zero = b == 0
    divisor = np.where(zero, b.dtype.type(1), b)
    floor = a // divisor
    quotient = floor + ((a % divisor != 0) & ((a < 0) != (divisor < 0))).astype(a.dtype)
    return np.where(zero, np.invert(b.dtype.type(0)), quotient)


def integer_division(instruction: Instruction, context: Context, kind: str) -> Execute:
    return elementwise(instruction, context, _integer_quotient, kind, [kind, kind])


@defines("rem")
def _remainder(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)
    return elementwise(
        instruction, context, lambda a, b: np.where(b == 0, a, a - _integer_quotient(a, b) * b), kind, [kind, kind]
    )


# Sign, minimum, maximum


@defines("abs", "neg")
def _sign(instruction: Instruction, context: Context) -> Execute:
    (kind,), flags = split(instruction, "ftz")
    if kind not in FLOATS:
        return elementwise(instruction, context, np.negative if instruction.opcode == "neg" else np.abs, kind, [kind])
    function = np.negative if instruction.opcode == "neg" else np.abs
    # These act on the sign bit alone: a NaN keeps its payload.
    return elementwise(instruction, context, lambda a: function(flush(a) if "ftz" in flags else a), kind, [kind])


@defines("min", "max")
def _extremum(instruction: Instruction, context: Context) -> Execute:
    (kind,), flags = split(instruction, "ftz", "NaN", "relu")
    smaller = instruction.opcode == "min"
    if kind not in FLOATS:
        if flags:
            raise unsupported(instruction)
        return elementwise(instruction, context, np.minimum if smaller else np.maximum, kind, [kind, kind])
    if "relu" in flags:
        raise unsupported(instruction)

    def function(a: Array, b: Array) -> Array:
        # -0 counts as less than +0, which a comparison does not see.
        first = a < b if smaller else a > b
        first |= (a == b) & (np.signbit(a) == smaller)
        value = np.where(first, a, b)
        if "NaN" in flags:
            return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), value)
        return np.where(np.isnan(a), b, np.where(np.isnan(b), a, value))

    return elementwise(instruction, context, float_function(function, flags), kind, [kind, kind])


@defines("copysign")
def _copysign(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)
    return elementwise(instruction, context, lambda a, b: np.copysign(b, a), kind, [kind, kind])


# Comparison and selection

_ORDERED: dict[str, Any] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_COMBINATIONS: dict[str, Any] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


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
    smallest = np.finfo(DTYPES[kind]).smallest_normal
    tests: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda a: ~np.isnan(a), "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= smallest),
        "subnormal": lambda a: (np.abs(a) < smallest) & (a != 0),
    }  # fmt: skip
    return elementwise(instruction, context, tests[flags.pop()], "pred", [kind])


# Bits

_LOGIC: dict[str, Any] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@defines("and", "or", "xor", "not")
def _logic(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)
    function = _LOGIC[instruction.opcode]
    return elementwise(instruction, context, function, kind, [kind] * (len(instruction.operands) - 1))


@defines("cnot")
def _logical_not(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)
    return elementwise(instruction, context, lambda a: (a == 0).astype(a.dtype), kind, [kind])


@defines("lop3")
def _any_logic(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)
    table = instruction.operands[4]
    if not isinstance(table, Immediate):
        raise unsupported(instruction)
    registers = context.registers
    sources = [registers.source(operand, kind) for operand in instruction.operands[1:4]]
    write = registers.target(instruction.operands[0], kind)

    def run(mask: Mask) -> None:
        result = np.zeros_like(sources[0])
        for index in range(8):
            if table.value >> index & 1:
                # Bit `index` of the table is the answer where (a, b, c) spell `index` in binary.
                a, b, c = (
                    source if index >> bit & 1 else ~source for source, bit in zip(sources, (2, 1, 0), strict=True)
                )
                result |= a & b & c
        write(result, mask)

    return run


@defines("shl", "shr")
def _shift(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)
    dtype = np.dtype(DTYPES[kind])
    bits = 8 * dtype.itemsize
    left = instruction.opcode == "shl"

    def function(a: Array, amount: Array) -> Array:
        small = np.minimum(amount, bits - 1).astype(dtype)
        if not left and dtype.kind == "i":  # a longer shift leaves copies of the sign, as one by bits - 1 does
            return a >> small
        return np.where(amount < bits, a << small if left else a >> small, dtype.type(0))

    return elementwise(instruction, context, function, kind, [kind, "u32"])


@defines("shf")
def _funnel_shift(instruction: Instruction, context: Context) -> Execute:
    (kind,), flags = split(instruction, "l", "r", "wrap", "clamp")
    if kind != "b32" or not flags & {"wrap", "clamp"}:
        raise unsupported(instruction)

    def function(low: Array, high: Array, amount: Array) -> Array:
        count = (amount & 31 if "wrap" in flags else np.minimum(amount, 32)).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
        if "l" in flags:
            return ((both << count) >> np.uint64(32)).astype(np.uint32)
        return (both >> count).astype(np.uint32)

    return elementwise(instruction, context, function, kind, ["b32", "b32", "u32"])


@defines("prmt")
def _permute(instruction: Instruction, context: Context) -> Execute:
    (kind,), flags = split(instruction)  # the named modes (f4e, rc8, ...) are not defined here
    if kind != "b32" or flags:
        raise unsupported(instruction)

    def function(a: Array, b: Array, selector: Array) -> Array:
        both = np.stack([a, b], 1).view(np.uint8)
        choice = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
        picked = np.take_along_axis(both, (choice & 7).astype(np.int64), 1)
        sign = np.where(picked & 128, np.uint8(255), np.uint8(0))
        return np.ascontiguousarray(np.where(choice & 8, sign, picked)).view(np.uint32)[:, 0]

    return elementwise(instruction, context, function, kind, [kind] * 3)


@defines("bfe")
def _extract_field(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)
    bits = int(kind[1:])

    def function(a: Array, start: Array, length: Array) -> Array:
        position = (start & 255).astype(np.int64)[:, None] + np.arange(bits)
        count = (length & 255).astype(np.int64)[:, None]
        # Beyond the field, or beyond the register: the sign, which is the field's topmost bit that exists; 0 unsigned.
        top = np.minimum(position[:, :1] + count - 1, bits - 1)
        value = a.view(f"u{bits // 8}")[:, None]
        one = value.dtype.type(1)
        bit = (value >> np.minimum(position, bits - 1).astype(value.dtype)) & one
        fill = np.zeros_like(value)
        if kind[0] == "s":
            fill = np.where(count == 0, value.dtype.type(0), (value >> np.maximum(top, 0).astype(value.dtype)) & one)
        inside = (np.arange(bits) < count) & (position < bits)
        chosen = np.where(inside, bit, fill)
        return (chosen << np.arange(bits, dtype=value.dtype)).sum(1, dtype=value.dtype).view(a.dtype)

    return elementwise(instruction, context, function, kind, [kind, "u32", "u32"])


@defines("bfi")
def _insert_field(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)
    bits = int(kind[1:])

    def function(a: Array, b: Array, start: Array, length: Array) -> Array:
        position = np.arange(bits) - (start & 255).astype(np.int64)[:, None]
        inside = (position >= 0) & (position < (length & 255).astype(np.int64)[:, None])
        one = b.dtype.type(1)
        source = (a[:, None] >> np.clip(position, 0, bits - 1).astype(b.dtype)) & one
        kept = (b[:, None] >> np.arange(bits, dtype=b.dtype)) & one
        return (np.where(inside, source, kept) << np.arange(bits, dtype=b.dtype)).sum(1, dtype=b.dtype)

    return elementwise(instruction, context, function, kind, [kind, kind, "u32", "u32"])


def _bits_of(a: Array) -> Array:
    """(threads, bits), the lowest bit first."""
    return (a[:, None] >> np.arange(8 * a.dtype.itemsize, dtype=a.dtype)) & a.dtype.type(1)


@defines("popc", "clz", "brev")
def _count_bits(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)

    def population(a: Array) -> Array:
        return _bits_of(a).sum(1).astype(np.uint32)

    def leading(a: Array) -> Array:
        bits = _bits_of(a)[:, ::-1]
        return np.where(a == 0, bits.shape[1], bits.argmax(1)).astype(np.uint32)

    def reverse(a: Array) -> Array:
        bits = _bits_of(a)[:, ::-1]
        return (bits << np.arange(bits.shape[1], dtype=a.dtype)).sum(1, dtype=a.dtype)

    function, result = {"popc": (population, "u32"), "clz": (leading, "u32"), "brev": (reverse, kind)}[
        instruction.opcode
    ]
    return elementwise(instruction, context, function, result, [kind])


# Moves


@defines("mov")
def _move(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)
    target, source = instruction.operands
    registers = context.registers
    if isinstance(target, Vector):
        part = f"b{int(kind[1:]) // len(target.parts)}"
        pieces = registers.source(source, kind).view(DTYPES[part]).reshape(registers.num_threads, -1)
        writes = [registers.target(operand, part) for operand in target.parts]

        def unpack(mask: Mask) -> None:
            for i, write in enumerate(writes):
                write(pieces[:, i], mask)

        return unpack
    write = registers.target(target, kind)
    if isinstance(source, Vector):
        part = f"b{int(kind[1:]) // len(source.parts)}"
        parts = [registers.source(operand, part) for operand in source.parts]
        return lambda mask: write(np.stack(parts, 1).view(DTYPES[kind])[:, 0], mask)
    value = registers.source(source, kind)
    return lambda mask: write(value, mask)


@defines("cvta")
def _to_generic(instruction: Instruction, context: Context) -> Execute:
    # Global addresses are generic ones here; shared and local windows are not modelled.
    (kind,), flags = split(instruction, "to", "global")
    if "global" not in flags:
        raise unsupported(instruction)
    return elementwise(instruction, context, lambda a: a, kind, [kind])

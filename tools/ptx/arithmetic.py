"""Integer and float arithmetic, thread by thread: sums, products, remainders, signs, minimum and maximum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arrays import Array
from .definitions import Context, Execute, defines, split, unsupported
from .elementwise import FLOATS, ROUNDINGS, elementwise, float_function, rounding_of
from .parser import Instruction
from .registers import DTYPES
from .rounding import flush, multiply_add_float32, round_float, sum_to_odd

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
        upper: Array = a.astype(wide) * b.astype(wide) >> wide.type(8 * a.dtype.itemsize)
        return upper.astype(a.dtype)
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
        sums: Array = products.reshape(-1, 4).sum(1) + c.astype(np.int64)
        return sums.astype(DTYPES[result])

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

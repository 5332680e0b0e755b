"""cvt: between integer widths, integers and floats, and float formats, with rounding and saturation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arrays import Array, DType
from .definitions import Context, Execute, defines, split, unsupported
from .elementwise import FLOATS, ROUNDINGS, float_function, rounding_of
from .parser import Instruction
from .registers import DTYPES
from .rounding import flush, round_float, round_to_integer

INTEGRAL = ("rni", "rzi", "rmi", "rpi")


def float_to_integer(value: Array, dtype: DType, mode: str) -> Array:
    """Clamped to the integer's range. NaN gives 0, but where either side is 64 bits wide only the top bit set."""
    rounded = round_to_integer(value.astype(np.float64), mode)
    limits = np.iinfo(dtype)
    above = 2.0 ** (limits.bits - (dtype.kind == "i"))  # the maximum plus 1, which float64 holds at every width
    inside = (rounded < above) & (rounded >= float(limits.min))
    result = np.where(inside, rounded, 0).astype(dtype)
    result = np.where(rounded >= above, dtype.type(limits.max), result)
    result = np.where(rounded < float(limits.min), dtype.type(limits.min), result)
    wide = value.dtype.itemsize == 8 or limits.bits == 64
    nan = np.array(1 << limits.bits - 1 if wide else 0, f"u{dtype.itemsize}").view(dtype)
    return np.where(np.isnan(rounded), nan, result)


def integer_to_float(value: Array, dtype: DType, mode: str) -> Array:
    if mode == "rn" or (dtype == np.float64 and value.dtype.itemsize <= 4):
        if value.dtype.itemsize == 8 and dtype != np.float64:
            return _odd_float64(value).astype(dtype)
        return value.astype(np.float64).astype(dtype) if dtype == np.float16 else value.astype(dtype)
    return round_float(_odd_float64(value), dtype, mode)


def _odd_float64(value: Array) -> Array:
    """Integers as float64, rounded to odd where 53 bits do not hold them."""
    if value.dtype.itemsize <= 4:
        return value.astype(np.float64)
    magnitude = np.where(value < 0, -value, value).view(np.uint64)
    # Above 2**53 the lowest 11 bits decide nothing but whether anything is there.
    sticky = (magnitude & np.uint64(0x7FF)) != 0
    cut = (magnitude & ~np.uint64(0x7FF)) | np.where(sticky, np.uint64(0x800), np.uint64(0))
    result = np.where(magnitude >> np.uint64(53), cut, magnitude).astype(np.float64)
    return np.where(value < 0, -result, result)


@defines("cvt")
def _convert(instruction: Instruction, context: Context) -> Execute:
    kinds, flags = split(instruction, "ftz", "sat", *ROUNDINGS, *INTEGRAL)
    if len(kinds) != 2 or "f16x2" in kinds or len(instruction.operands) != 2:
        raise unsupported(instruction)
    to, source_kind = kinds
    source = context.registers.source(instruction.operands[1], source_kind, narrow=True)
    write = context.registers.target(instruction.operands[0], to, extend=True)
    convert = _conversion(source_kind, np.dtype(DTYPES[to]), flags)
    if convert is None:
        raise unsupported(instruction)
    return lambda mask: write(convert(source), mask)


def _conversion(source_kind: str, dtype: DType, flags: set[str]) -> Callable[[Array], Array] | None:
    """Values of the source type -> values of dtype; None where PTX has no such conversion."""
    mode = rounding_of(flags)
    integral = next((name for name in INTEGRAL if name in flags), None)

    def flush32(value: Array) -> Array:  # .ftz is about float32; float16 keeps its subnormals
        return flush(value) if "ftz" in flags and value.dtype == np.float32 else value

    if source_kind in FLOATS and dtype.kind == "f":

        def between_floats(value: Array) -> Array:
            value = flush32(value)
            if integral is not None:
                return flush32(round_to_integer(value, integral).astype(dtype))
            return flush32(round_float(value.astype(np.float64), dtype, mode))

        return float_function(between_floats, flags - {"ftz"})
    if source_kind in FLOATS:
        if integral is None:
            return None
        clamp = integral
        return lambda value: float_to_integer(flush32(value), dtype, clamp)
    if integral is not None:
        return None
    if dtype.kind == "f":
        return float_function(lambda value: integer_to_float(value, dtype, mode), flags - {"ftz"})
    if "sat" in flags:
        limits = np.iinfo(dtype)
        return lambda value: np.array([min(max(int(v), limits.min), limits.max) for v in value], dtype)
    return lambda value: value.astype(dtype)

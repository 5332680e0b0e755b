"""cvt: between integer widths, integers and floats, and float formats, with rounding and saturation."""

from __future__ import annotations

import numpy as np

from .arithmetic import FLOATS, ROUNDINGS, rounding_of
from .definitions import Context, Execute, defines, split, unsupported
from .parser import Instruction
from .registers import DTYPES, Array, Mask
from .rounding import canonical, flush, round_float, round_to_integer, saturate

INTEGRAL = ("rni", "rzi", "rmi", "rpi")


def float_to_integer(value: Array, dtype: np.dtype, mode: str) -> Array:
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


def integer_to_float(value: Array, dtype: np.dtype, mode: str) -> Array:
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
    dtype = np.dtype(DTYPES[to])
    source = context.registers.source(instruction.operands[1], source_kind, narrow=True)
    write = context.registers.target(instruction.operands[0], to, extend=True)
    mode = rounding_of(flags)
    integral = next((name for name in INTEGRAL if name in flags), None)
    from_float, to_float = source_kind in FLOATS, to in FLOATS
    if from_float and not to_float and integral is None:
        raise unsupported(instruction)

    def run(mask: Mask) -> None:
        value = source
        if from_float and "ftz" in flags:
            value = flush(value)
        if from_float and to_float:
            if integral is not None:
                result = round_to_integer(value, integral).astype(dtype)
            else:
                result = round_float(value.astype(np.float64), dtype, mode)
            if "ftz" in flags and dtype == np.float32:
                result = flush(result)
            result = canonical(saturate(result) if "sat" in flags else result)
        elif from_float:
            result = float_to_integer(value, dtype, integral)
        elif to_float:
            result = integer_to_float(np.ascontiguousarray(value), dtype, mode)
            if "sat" in flags:
                result = saturate(result)
        elif "sat" in flags:
            limits = np.iinfo(dtype)
            result = np.array([min(max(int(v), limits.min), limits.max) for v in value], dtype)
        else:
            result = value.astype(dtype)
        write(result, mask)

    return run

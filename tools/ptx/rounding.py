"""Correctly rounded float arithmetic in NumPy: fused multiply-add, directed rounding, subnormals flushed to zero.

Everything goes through float64 rounded *to odd*: when a sum is not exact, its last bit is set. Such a value holds at
least two bits more than float32 and float16 need, so rounding it once more, in any direction, gives the result that
rounding the exact value would have given (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums").
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arrays import Array, DType

CANONICAL_NAN = {2: 0x7FFF, 4: 0x7FFFFFFF}  # what float instructions return, by size in bytes; f64 keeps payloads
SMALLEST_NORMAL = {2: np.float64(2.0**-14), 4: np.float64(2.0**-126), 8: np.float64(2.0**-1022)}
_BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def sum_to_odd(a: Array, b: Array) -> Array:
    """a + b of two float64 arrays, rounded to odd."""
    total = a + b
    # The two-sum of Knuth: total + error == a + b exactly.
    head = total - a
    error = (a - (total - head)) + (b - head)
    inexact = (error != 0) & np.isfinite(total) & np.isfinite(error)
    if inexact.any():
        bits = total.view(np.int64)
        # total was rounded to nearest. Where its last bit is even, the odd neighbour on the error's side is the answer.
        away = (error > 0) == (total > 0)
        step = np.where(away, 1, -1)
        bits += np.where(inexact & (bits & 1 == 0), step, 0)
    return total


def multiply_add_float32(a: Array, b: Array, c: Array) -> Array:
    """fma.rn.f32: a * b + c rounded once, without the cost of rounding to odd where rounding twice cannot matter."""
    total = a.astype(np.float64)
    total *= b
    product = total.copy()
    total += c
    # Rounding to float64 first matters only if that lands on a tie between two float32, or on a float32 subnormal.
    tie = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    tie |= np.abs(total) < SMALLEST_NORMAL[4]
    if tie.any():
        total = sum_to_odd(product, c.astype(np.float64))
    return total.astype(np.float32)


def round_float(value: Array, dtype: DType, mode: str) -> Array:
    """Exact (or odd-rounded) float64 values -> dtype, with PTX's mode rn, rz, rm or rp."""
    nearest = value.astype(dtype)
    if mode == "rn" or dtype == np.float64:
        return nearest
    back = nearest.astype(np.float64)
    up, down = np.array(np.inf, dtype), np.array(-np.inf, dtype)
    if mode == "rz":
        low = np.where(value > 0, down, up)
        return np.where(np.abs(back) > np.abs(value), np.nextafter(nearest, low), nearest)
    if mode == "rm":
        return np.where(back > value, np.nextafter(nearest, down), nearest)
    return np.where(back < value, np.nextafter(nearest, up), nearest)


def round_to_integer(value: Array, mode: str) -> Array:
    """Float values rounded to an integral value, with PTX's mode rni, rzi, rmi or rpi."""
    functions: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    return functions[mode](value)


def flush(value: Array) -> Array:
    """Subnormals -> zero of the same sign (.ftz)."""
    subnormal = (value != 0) & (np.abs(value) < SMALLEST_NORMAL[value.dtype.itemsize].astype(value.dtype))
    return np.where(subnormal, np.copysign(np.zeros_like(value), value), value) if subnormal.any() else value


def saturate(value: Array) -> Array:
    """Clamped to [0, 1], NaN to +0 (.sat)."""
    clamped: Array = np.where(np.isnan(value), 0, np.clip(value, 0, 1)).astype(value.dtype) + value.dtype.type(0)
    return clamped


def canonical(value: Array) -> Array:
    """NaNs replaced by the one NaN that float16 and float32 instructions return."""
    if value.dtype.itemsize == 8:
        return value
    nan = np.isnan(value)
    if nan.any():
        value = value.copy()
        value.view(_BITS[value.dtype.itemsize])[nan] = CANONICAL_NAN[value.dtype.itemsize]
    return value

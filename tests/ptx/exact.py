"""IEEE arithmetic on Python's exact fractions: what the tests hold the machine's floats against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Format:
    dtype: type
    precision: int
    lowest: int  # exponent of the smallest normal number
    highest: int

    @property
    def largest(self) -> float:
        return float(Fraction(2) ** (self.highest + 1) - Fraction(2) ** (self.highest + 1 - self.precision))


F16 = Format(np.float16, 11, -14, 15)
F32 = Format(np.float32, 24, -126, 127)
FORMATS = {"f16": F16, "f32": F32}


def round_to(value: Fraction, form: Format, mode: str = "rn") -> float:
    """A nonzero exact value, rounded to the format."""
    exponent = value.numerator.bit_length() - value.denominator.bit_length()  # or one too many
    exponent -= abs(value) < Fraction(2) ** exponent
    quantum = Fraction(2) ** (max(exponent, form.lowest) - form.precision + 1)
    steps = value / quantum
    to_integer: dict[str, Callable[[Fraction], int]]
    to_integer = {"rn": round, "rz": math.trunc, "rm": math.floor, "rp": math.ceil}
    whole = to_integer[mode](steps)
    result = whole * quantum
    if abs(result) > form.largest:
        stays = mode == "rz" or (mode == "rm" and value > 0) or (mode == "rp" and value < 0)
        return math.copysign(form.largest if stays else math.inf, value)
    return math.copysign(float(abs(result)), value)


def add(a: float, b: float, form: Format, mode: str = "rn") -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return a + b
    total = Fraction(a) + Fraction(b)
    if total:
        return round_to(total, form, mode)
    if math.copysign(1, a) == math.copysign(1, b):
        return a  # both are zeros of that sign
    return -0.0 if mode == "rm" else 0.0


def multiply(a: float, b: float, form: Format, mode: str = "rn") -> float:
    if not (math.isfinite(a) and math.isfinite(b)) or a == 0 or b == 0:
        return a * b
    return round_to(Fraction(a) * Fraction(b), form, mode)


def multiply_add(a: float, b: float, c: float, form: Format, mode: str = "rn") -> float:
    if not all(map(math.isfinite, (a, b, c))):
        return a * b + c
    total = Fraction(a) * Fraction(b) + Fraction(c)
    if total:
        return round_to(total, form, mode)
    product_sign = math.copysign(1, a) * math.copysign(1, b)
    if product_sign == math.copysign(1, c):
        return math.copysign(0.0, c)
    return -0.0 if mode == "rm" else 0.0


def flush(value: float, form: Format) -> float:
    return math.copysign(0.0, value) if abs(value) < 2.0**form.lowest else value

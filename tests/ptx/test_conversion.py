"""cvt against exact fractions and Python's integers."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.ptx.registers import DTYPES

from . import exact
from .harness import examples, execute
from .test_float import MODES, assert_same, floats
from .test_integer import FAMILY, integers, wrap

TO_INTEGER: dict[str, Callable[[Fraction], int]] = {
    "rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil,
}  # fmt: skip


def convert(text: str, to: str, source_kind: str, values: np.ndarray) -> np.ndarray:
    out, source = (f"{FAMILY[int(kind[1:])]}{i}" for i, kind in enumerate((to, source_kind)))
    return execute(f"cvt.{text} {out}, {source};", {source: (source_kind, values)}, {out: to})[out]


@pytest.mark.parametrize("mode", MODES)
@examples
@given(values=floats("f32"))
def test_float32_to_float16(mode: str, values: np.ndarray) -> None:
    scaled = np.where(np.arange(32) % 2, values, np.float32(3e-8) * (np.arange(32, dtype=np.float32) - 9))
    wanted = [exact.round_to(Fraction(x), exact.F16, mode) if math.isfinite(x) and x else x for x in map(float, scaled)]
    assert_same(convert(f"{mode}.f16.f32", "f16", "f32", scaled), wanted, "f16")


def test_a_long_integer_just_above_a_tie() -> None:
    # Halfway between two float32, but for the 1, which float64 would lose.
    values = np.full(32, 2**62 + 2**38 + 1, np.int64)
    assert np.all(convert("rn.f32.s64", "f32", "s64", values) == np.float32(2.0**62 + 2.0**39))
    assert np.all(convert("rn.f32.s64", "f32", "s64", values - 1) == np.float32(2.0**62))


def test_ftz_flushes_float32_and_keeps_float16_subnormals() -> None:
    tiny = np.full(32, 2.0**-130, np.float32)
    small = np.full(32, 2.0**-20, np.float32)  # subnormal as float16
    assert not convert("rp.ftz.f16.f32", "f16", "f32", tiny).any()
    assert np.all(convert("rp.f16.f32", "f16", "f32", tiny) == np.float16(2.0**-24))
    assert np.all(convert("rn.ftz.f16.f32", "f16", "f32", small) == np.float16(2.0**-20))
    assert np.all(convert("ftz.f32.f16", "f32", "f16", small.astype(np.float16)) == small)


def test_every_float16_to_float32() -> None:
    for start in range(0, 1 << 16, 1 << 12):
        halves = np.arange(start, start + 32, dtype=np.uint16).view(np.float16)
        assert_same(convert("f32.f16", "f32", "f16", halves), [float(x) for x in halves], "f32")


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "s16"])
@pytest.mark.parametrize("mode", MODES)
@examples
@given(data=st.data())
def test_integers_to_float32(kind: str, mode: str, data: st.DataObject) -> None:
    values = data.draw(integers(kind))
    wanted = [exact.round_to(Fraction(x), exact.F32, mode) if x else 0.0 for x in values.tolist()]
    assert_same(convert(f"{mode}.f32.{kind}", "f32", kind, values), wanted, "f32")


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "s16"])
@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@examples
@given(values=floats("f32"))
def test_float32_to_integers_clamps(kind: str, mode: str, values: np.ndarray) -> None:
    limits = np.iinfo(np.dtype(DTYPES[kind]).name)
    wanted = []
    for x in map(float, values):
        if math.isnan(x):
            wanted.append(wrap(1 << 63, kind) if limits.bits == 64 else 0)
        elif math.isinf(x):
            wanted.append(limits.max if x > 0 else limits.min)
        else:
            wanted.append(min(max(TO_INTEGER[mode](Fraction(x)), limits.min), limits.max))
    assert convert(f"{mode}.{kind}.f32", kind, "f32", values).tolist() == wanted


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@examples
@given(values=floats("f32"))
def test_rounding_to_integral_floats(mode: str, values: np.ndarray) -> None:
    define = TO_INTEGER[mode]
    wanted = [math.copysign(float(define(Fraction(x))), x) if math.isfinite(x) else x for x in map(float, values)]
    assert_same(convert(f"{mode}.f32.f32", "f32", "f32", values), wanted, "f32")


@pytest.mark.parametrize(
    ("to", "kind"), [("u64", "u32"), ("s64", "s32"), ("u32", "u64"), ("s32", "s16"), ("u16", "u32")]
)
@examples
@given(data=st.data())
def test_integer_widths(to: str, kind: str, data: st.DataObject) -> None:
    values = data.draw(integers(kind))
    assert convert(f"{to}.{kind}", to, kind, values).tolist() == [wrap(x, to) for x in values.tolist()]


@examples
@given(values=integers("u32"))
def test_bytes_are_read_from_wider_registers(values: np.ndarray) -> None:
    text = "cvt.u16.u32 %h0, %r1; cvt.s16.s8 %h1, %h0; cvt.u32.u8 %r2, %r1; cvt.sat.u8.s32 %r3, %r1;"
    got = execute(text, {"%r1": ("u32", values)}, {"%h1": "s16", "%r2": "u32", "%r3": "u32"})
    assert got["%h1"].tolist() == [wrap(x, "s8") for x in values.tolist()]
    assert got["%r2"].tolist() == [x & 255 for x in values.tolist()]
    assert got["%r3"].tolist() == [min(max(wrap(x, "s32"), 0), 255) for x in values.tolist()]

"""Float instructions against exact fractions, bit for bit: rounding modes, subnormals, .ftz, .sat, NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from . import exact
from .harness import bits, examples, execute

MODES = ["rn", "rz", "rm", "rp"]
REGISTERS = {"f16": "%h", "f32": "%r"}


def floats(kind: str) -> st.SearchStrategy[np.ndarray]:
    """32 values, whose exponents are often close enough for sums to cancel and products to underflow."""
    dtype = exact.FORMATS[kind].dtype
    width = np.dtype(dtype).itemsize * 8
    patterns: st.SearchStrategy[Any] = st.integers(0, 2**width - 1).map(
        lambda b: np.array(b, f"u{width // 8}").view(dtype)[()]
    )
    near = st.integers(-(2**13), 2**13).flatmap(
        lambda m: st.sampled_from([-149, -140, -24, -12, 0, 1]).map(lambda e: dtype(m * 2.0**e))
    )
    special = st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0]).map(dtype)
    return st.lists(patterns | near | special, min_size=32, max_size=32).map(lambda v: np.array(v, dtype))


def assert_same(got: np.ndarray, wanted: list[float], kind: str) -> None:
    expected: np.ndarray = np.array(wanted, np.float64).astype(exact.FORMATS[kind].dtype)
    canonical = {2: 0x7FFF, 4: 0x7FFFFFFF}[expected.dtype.itemsize]
    want = [canonical if math.isnan(w) else b for w, b in zip(wanted, bits(expected), strict=True)]
    assert bits(got) == want


def run(text: str, kind: str, *sources: np.ndarray) -> np.ndarray:
    family = REGISTERS[kind]
    inputs = {f"{family}{i + 1}": (kind, source) for i, source in enumerate(sources)}
    operands = ", ".join([f"{family}0", *inputs])
    return execute(f"{text} {operands};", inputs, {f"{family}0": kind})[f"{family}0"]


@pytest.mark.parametrize("kind", ["f16", "f32"])
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
@examples
@given(data=st.data())
def test_arithmetic_rounds_the_exact_result(name: str, kind: str, data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(MODES if kind == "f32" else ["rn"]))
    a, b = data.draw(floats(kind)), data.draw(floats(kind))
    define = {"add": exact.add, "sub": lambda a, b, *rest: exact.add(a, -b, *rest), "mul": exact.multiply}[name]
    wanted = [define(float(x), float(y), exact.FORMATS[kind], mode) for x, y in zip(a, b, strict=True)]
    assert_same(run(f"{name}.{mode}.{kind}", kind, a, b), wanted, kind)


@pytest.mark.parametrize("kind", ["f16", "f32"])
@examples
@given(data=st.data())
def test_fma_rounds_once(kind: str, data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(MODES if kind == "f32" else ["rn"]))
    a, b, c = (data.draw(floats(kind)) for _ in range(3))
    form = exact.FORMATS[kind]
    wanted = [exact.multiply_add(float(x), float(y), float(z), form, mode) for x, y, z in zip(a, b, c, strict=True)]
    assert_same(run(f"fma.{mode}.{kind}", kind, a, b, c), wanted, kind)


def test_fma_where_rounding_twice_would_be_wrong() -> None:
    # (1 + 2**-12)**2 = 1 + 2**-11 + 2**-24: a tie that the addend breaks.
    x = np.full(32, 1 + 2.0**-12, np.float32)
    tiny = np.where(np.arange(32) % 2, 2.0**-60, -(2.0**-60)).astype(np.float32)  # float64 would lose it
    got = run("fma.rn.f32", "f32", x, x, tiny)
    assert got.tolist() == [1 + 2.0**-11 + (2.0**-23 if t > 0 else 0) for t in tiny]


def test_fma_where_rounding_twice_would_be_wrong_for_a_subnormal() -> None:
    # The product is just below half of the smallest subnormal, by less than float64 holds beside c.
    a, b = (np.full(32, (1 + sign * 2.0**-23) * 2.0**-75, np.float32) for sign in (1, -1))
    c = np.full(32, 1025 * 2.0**-149, np.float32)
    assert run("fma.rn.f32", "f32", a, b, c).tolist() == c.tolist()


@pytest.mark.parametrize("name", ["add", "mul", "fma"])
@examples
@given(data=st.data())
def test_ftz_flushes_inputs_and_results(name: str, data: st.DataObject) -> None:
    sources = [data.draw(floats("f32")) for _ in range(3 if name == "fma" else 2)]
    functions: dict[str, Callable[..., float]]
    functions = {"add": exact.add, "mul": exact.multiply, "fma": exact.multiply_add}
    wanted = []
    for values in zip(*sources, strict=True):
        flushed = [exact.flush(float(value), exact.F32) for value in values]
        wanted.append(exact.flush(functions[name](*flushed, exact.F32), exact.F32))
    assert_same(run(f"{name}.rn.ftz.f32", "f32", *sources), wanted, "f32")


@examples
@given(a=floats("f32"), b=floats("f32"))
def test_sat_clamps_to_the_unit_interval(a: np.ndarray, b: np.ndarray) -> None:
    wanted = []
    for x, y in zip(a, b, strict=True):
        total = exact.add(float(x), float(y), exact.F32)
        wanted.append(0.0 if math.isnan(total) or total <= 0 else min(total, 1.0))
    assert_same(run("add.rn.sat.f32", "f32", a, b), wanted, "f32")


@examples
@given(a=floats("f16"), b=floats("f16"), c=floats("f16"), d=floats("f16"))
def test_packed_halves_are_two_halves(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> None:
    left, right = np.stack([a, b], 1).ravel(), np.stack([c, d], 1).ravel()
    got = execute(
        "@%p1 fma.rn.f16x2 %r0, %r1, %r2, %r1;",
        {"%r1": ("f16x2", left), "%r2": ("f16x2", right), "%p1": ("pred", np.arange(32) % 2)},
        {"%r0": "f16x2"},
    )["%r0"]
    wanted = [exact.multiply_add(float(x), float(y), float(x), exact.F16) for x, y in zip(left, right, strict=True)]
    off = np.repeat(np.arange(32) % 2 == 0, 2)
    assert_same(got, [0.0 if skipped else w for skipped, w in zip(off, wanted, strict=True)], "f16")


def _smaller(a: float, b: float) -> bool:
    return (a, math.copysign(1, a)) < (b, math.copysign(1, b))


@pytest.mark.parametrize("name", ["min", "max"])
@pytest.mark.parametrize("nan", ["", ".NaN"])
@pytest.mark.parametrize("kind", ["f16", "f32"])
@examples
@given(data=st.data())
def test_minimum_and_maximum(name: str, nan: str, kind: str, data: st.DataObject) -> None:
    a, b = data.draw(floats(kind)), data.draw(floats(kind))
    wanted = []
    for x, y in zip(map(float, a), map(float, b), strict=True):
        if math.isnan(x) or math.isnan(y):
            wanted.append(math.nan if nan else y if math.isnan(x) else x)
        else:
            wanted.append(x if _smaller(x, y) == (name == "min") else y)
    assert_same(run(f"{name}{nan}.{kind}", kind, a, b), wanted, kind)


@examples
@given(a=floats("f32"))
def test_sign_instructions_touch_one_bit(a: np.ndarray) -> None:
    assert bits(run("neg.f32", "f32", a)) == [b ^ 0x80000000 for b in bits(a)]
    assert bits(run("abs.f32", "f32", a)) == [b & 0x7FFFFFFF for b in bits(a)]


@examples
@given(a=floats("f32"), b=floats("f32"))
def test_copysign_and_classes(a: np.ndarray, b: np.ndarray) -> None:
    # copysign takes the sign of its first source.
    got = bits(run("copysign.f32", "f32", a, b))
    assert got == [y & 0x7FFFFFFF | x & 0x80000000 for x, y in zip(bits(a), bits(b), strict=True)]
    names = ["finite", "infinite", "number", "notanumber", "normal", "subnormal"]
    text = " ".join(f"testp.{name}.f32 %p{i}, %r1;" for i, name in enumerate(names))
    tests = execute(text, {"%r1": ("f32", a)}, {f"%p{i}": "pred" for i in range(6)})
    for lane, pattern in enumerate(bits(a)):
        exponent, fraction = pattern >> 23 & 255, pattern & 0x7FFFFF
        nan, infinite = exponent == 255 and fraction != 0, exponent == 255 and fraction == 0
        finite = exponent < 255
        wanted = [finite, infinite, not nan, nan, finite and exponent > 0, exponent == 0 and fraction != 0]
        assert [bool(tests[f"%p{i}"][lane]) for i in range(6)] == wanted


_HOLDS = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("name", list(_HOLDS))
@examples
@given(a=floats("f32"), b=floats("f32"))
def test_comparisons_ordered_and_unordered(name: str, a: np.ndarray, b: np.ndarray) -> None:
    inputs = {"%r1": ("f32", a), "%r2": ("f32", np.where(np.arange(32) % 3, b, a))}
    text = f"setp.{name}.f32 %p0, %r1, %r2; setp.{name}u.f32 %p1, %r1, %r2; setp.num.f32 %p2, %r1, %r2;"
    got = execute(text, inputs, {"%p0": "pred", "%p1": "pred", "%p2": "pred"})
    for i, (x, y) in enumerate(zip(*(map(float, array) for _, array in inputs.values()), strict=True)):
        ordered = not (math.isnan(x) or math.isnan(y))
        assert got["%p2"][i] == ordered
        assert got["%p0"][i] == (ordered and _HOLDS[name](x, y))
        assert got["%p1"][i] == (not ordered or _HOLDS[name](x, y))


_EXACT = {
    "ex2": lambda x: 2.0**x if x < 1024 else math.inf,
    "lg2": lambda x: math.log2(x) if x > 0 else -math.inf if x == 0 else math.nan,
    "rcp": lambda x: 1 / x if x else math.copysign(math.inf, x),
    "sqrt": lambda x: math.sqrt(x) if x > 0 else x if x == 0 else math.nan,
    "rsqrt": lambda x: 1 / math.sqrt(x) if x > 0 else math.copysign(math.inf, x) if x == 0 else math.nan,
    "tanh": math.tanh,
    "sin": math.sin,
    "cos": math.cos,
}


@pytest.mark.parametrize("name", list(_EXACT))
@examples
@given(a=floats("f32"))
def test_approximate_functions_are_within_half_a_unit(name: str, a: np.ndarray) -> None:
    a = np.where(np.isfinite(a) & (np.abs(a) < 1e30), a, np.float32(0.5))
    got = run(f"{name}.approx.f32", "f32", a)
    with np.errstate(all="ignore"):
        wanted = np.array([_EXACT[name](float(x)) for x in a])
        unit = np.spacing(np.abs(wanted).astype(np.float32)).astype(np.float64)
        same = (np.isnan(got) & np.isnan(wanted)) | (got == wanted.astype(np.float32))
        assert np.all(same | (np.abs(got - wanted) <= 0.5001 * unit))


@pytest.mark.parametrize("text", ["div.rn.f32", "rcp.rn.f32", "sqrt.rn.f32", "div.full.f32"])
@examples
@given(a=floats("f32"), b=floats("f32"))
def test_division_and_roots_are_correctly_rounded(text: str, a: np.ndarray, b: np.ndarray) -> None:
    ordinary = [np.where(np.isfinite(x) & (x != 0), x, np.float32(3)) for x in (a, b)]
    if text.startswith("sqrt"):
        x = np.abs(ordinary[0])
        got = run(text, "f32", x)
        for value, root in zip(x, got, strict=True):
            # The exact root lies between the midpoints to the neighbours of the rounded one.
            below, above = (np.nextafter(root, np.float32(end)) for end in (0, np.inf))
            low, high = ((Fraction(float(root)) + Fraction(float(n))) / 2 for n in (below, above))
            assert low**2 <= Fraction(float(value)) <= high**2
        return
    numerator = np.ones(32, np.float32) if text.startswith("rcp") else ordinary[0]
    sources = ordinary[1:] if text.startswith("rcp") else ordinary
    wanted = [
        exact.round_to(Fraction(float(x)) / Fraction(float(y)), exact.F32)
        for x, y in zip(numerator, ordinary[1], strict=True)
    ]
    assert_same(run(text, "f32", *sources), wanted, "f32")

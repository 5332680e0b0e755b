"""Integer, bit and selection instructions against Python's unbounded integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.ptx.registers import DTYPES

from .harness import bits, examples, execute

FAMILY = {16: "%h", 32: "%r", 64: "%d"}


def integers(kind: str) -> st.SearchStrategy[np.ndarray]:
    width = int(kind[1:])
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if kind[0] == "s" else (0, (1 << width) - 1)
    one = st.integers(low, high) | st.integers(-3, 40).map(lambda v: min(max(v, low), high))
    return st.lists(one, min_size=32, max_size=32).map(lambda v: np.array(v, DTYPES[kind]))


def run(text: str, kinds: list[str], target: str, *sources: np.ndarray) -> list[int]:
    """Executes `text` with its operands filled in; the result as Python integers."""
    names = [f"{FAMILY[int(kind[1:])]}{i + 1}" for i, kind in enumerate(kinds)]
    out = f"{FAMILY[int(target[1:])]}0"
    inputs = {name: (kind, source) for name, kind, source in zip(names, kinds, sources, strict=True)}
    results: list[int] = execute(f"{text} {', '.join([out, *names])};", inputs, {out: target})[out].tolist()
    return results


def wrap(value: int, kind: str) -> int:
    width = int(kind[1:])
    value &= (1 << width) - 1
    return value - (1 << width) if kind[0] == "s" and value >> width - 1 else value


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1


BINARY = {
    "add": lambda a, b, kind: a + b,
    "sub": lambda a, b, kind: a - b,
    "mul.lo": lambda a, b, kind: a * b,
    "mul.hi": lambda a, b, kind: a * b >> int(kind[1:]),
    "min": lambda a, b, kind: min(a, b),
    "max": lambda a, b, kind: max(a, b),
    "div": lambda a, b, kind: quotient(a, b),
    "rem": lambda a, b, kind: a - quotient(a, b) * b if b else a,
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", list(BINARY))
@examples
@given(data=st.data())
def test_arithmetic_wraps_around(name: str, kind: str, data: st.DataObject) -> None:
    a, b = data.draw(integers(kind)), data.draw(integers(kind))
    wanted = [wrap(BINARY[name](x, y, kind), kind) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert run(f"{name}.{kind}", [kind, kind], kind, a, b) == wanted


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
@examples
@given(data=st.data())
def test_wide_products(kind: str, data: st.DataObject) -> None:
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    a, b, c = data.draw(integers(kind)), data.draw(integers(kind)), data.draw(integers(wide))
    products = [x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert run(f"mul.wide.{kind}", [kind, kind], wide, a, b) == products
    wanted = [wrap(p + z, wide) for p, z in zip(products, c.tolist(), strict=True)]
    assert run(f"mad.wide.{kind}", [kind, kind, wide], wide, a, b, c) == wanted


@examples
@given(a=integers("s32"), b=integers("s32"), c=integers("s32"))
def test_mad_sad_and_saturating_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    triples = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
    assert run("mad.lo.s32", ["s32"] * 3, "s32", a, b, c) == [wrap(x * y + z, "s32") for x, y, z in triples]
    assert run("sad.s32", ["s32"] * 3, "s32", a, b, c) == [wrap(abs(x - y) + z, "s32") for x, y, z in triples]
    limit = 2**31 - 1
    assert run("add.sat.s32", ["s32"] * 2, "s32", a, b) == [min(max(x + y, -limit - 1), limit) for x, y, _ in triples]


@examples
@given(a=integers("s32"), b=integers("u32"), c=integers("s32"))
def test_dp4a_multiplies_bytes(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    def signed(v: int) -> list[int]:
        return [wrap(v >> 8 * i, "s8") for i in range(4)]

    wanted = [
        wrap(sum(p * (y >> 8 * i & 255) for i, p in enumerate(signed(x))) + z, "s32")
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    assert run("dp4a.s32.u32", ["s32", "u32", "s32"], "s32", a, b, c) == wanted


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "s32", "u32", "s64", "u64", "s16", "u16"])
@examples
@given(data=st.data())
def test_shifts_clamp_their_amount(kind: str, data: st.DataObject) -> None:
    width = int(kind[1:])
    a = data.draw(integers(kind))
    amount = data.draw(st.lists(st.integers(0, 80) | st.integers(0, 2**32 - 1), min_size=32, max_size=32))
    pairs = list(zip(a.tolist(), amount, strict=True))
    counts = np.array(amount, np.uint32)
    right = [x >> min(n, width) for x, n in pairs]  # of a negative number: copies of the sign
    assert run(f"shr.{kind}", [kind, "u32"], kind, a, counts) == right
    left = [wrap(x << min(n, width), kind) for x, n in pairs]
    assert run(f"shl.b{width}", [kind, "u32"], kind, a, counts) == left


@examples
@given(a=integers("u32"), b=integers("u32"), amount=integers("u32"))
def test_funnel_shifts(a: np.ndarray, b: np.ndarray, amount: np.ndarray) -> None:
    for mode, limit in (("wrap", lambda n: n & 31), ("clamp", lambda n: min(n, 32))):
        rows = [(h << 32 | low, limit(n)) for low, h, n in zip(a.tolist(), b.tolist(), amount.tolist(), strict=True)]
        left = run(f"shf.l.{mode}.b32", ["b32"] * 3, "u32", a, b, amount)
        assert left == [(both << n) >> 32 & 0xFFFFFFFF for both, n in rows]
        right = run(f"shf.r.{mode}.b32", ["b32"] * 3, "u32", a, b, amount)
        assert right == [both >> n & 0xFFFFFFFF for both, n in rows]


@examples
@given(a=integers("u32"), b=integers("u32"), c=integers("u32"), table=st.integers(0, 255))
def test_logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> None:
    triples = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
    assert run("and.b32", ["b32"] * 2, "u32", a, b) == [x & y for x, y, _ in triples]
    assert run("or.b32", ["b32"] * 2, "u32", a, b) == [x | y for x, y, _ in triples]
    assert run("xor.b32", ["b32"] * 2, "u32", a, b) == [x ^ y for x, y, _ in triples]
    assert run("not.b32", ["b32"], "u32", a) == [x ^ 0xFFFFFFFF for x in a.tolist()]
    assert run("cnot.b32", ["b32"], "u32", a) == [int(x == 0) for x in a.tolist()]
    # The table is what the function makes of a = 0xF0, b = 0xCC, c = 0xAA: bit k for the inputs' k-th combination.
    wanted = [
        sum((table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | z >> i & 1) & 1) << i for i in range(32))
        for x, y, z in triples
    ]
    inputs = {"%r1": ("b32", a), "%r2": ("b32", b), "%r3": ("b32", c)}
    got = execute(f"lop3.b32 %r0, %r1, %r2, %r3, {table:#x};", inputs, {"%r0": "b32"})["%r0"]
    assert got.tolist() == wanted


@examples
@given(a=integers("u32"), b=integers("u32"), selector=integers("u32"))
def test_prmt_picks_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> None:
    wanted = []
    for x, y, s in zip(a.tolist(), b.tolist(), selector.tolist(), strict=True):
        source = (y << 32 | x).to_bytes(8, "little")
        result = bytearray()
        for i in range(4):
            nibble = s >> 4 * i & 15
            byte = source[nibble & 7]
            result.append((255 if byte & 128 else 0) if nibble & 8 else byte)
        wanted.append(int.from_bytes(result, "little"))
    assert run("prmt.b32", ["b32"] * 3, "u32", a, b, selector) == wanted


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
@examples
@given(data=st.data())
def test_bit_fields(kind: str, data: st.DataObject) -> None:
    width = int(kind[1:])
    a, b = data.draw(integers(kind)), data.draw(integers(kind))
    small = st.lists(st.integers(0, 70) | st.integers(0, 2**32 - 1), min_size=32, max_size=32)
    start, length = (np.array(data.draw(small), np.uint32) for _ in range(2))
    wanted, inserted = [], []
    for x, y, p, n in zip(bits(a), bits(b), (start & 255).tolist(), (length & 255).tolist(), strict=True):
        field = (x >> p) & ((1 << n) - 1)
        if kind[0] == "s" and n:
            top = min(p + n - 1, width - 1)
            if x >> top & 1:  # everything from there on is a copy of that bit
                kept = max(top - p, 0)
                field = field & ((1 << kept) - 1) | -1 << kept
        wanted.append(wrap(field, kind))
        hole = ((1 << n) - 1) << p
        inserted.append(wrap(y & ~hole | x << p & hole, f"u{width}"))
    assert run(f"bfe.{kind}", [kind, "u32", "u32"], kind, a, start, length) == wanted
    result = run(f"bfi.b{width}", [kind, kind, "u32", "u32"], f"u{width}", a, b, start, length)
    assert result == inserted


@pytest.mark.parametrize("kind", ["b32", "b64"])
@examples
@given(data=st.data())
def test_counting_bits(kind: str, data: st.DataObject) -> None:
    width = int(kind[1:])
    a = data.draw(integers(kind))
    texts = [f"{x:0{width}b}" for x in a.tolist()]
    assert run(f"popc.{kind}", [kind], "u32", a) == [text.count("1") for text in texts]
    assert run(f"clz.{kind}", [kind], "u32", a) == [len(text) - len(text.lstrip("0")) for text in texts]
    assert run(f"brev.{kind}", [kind], kind, a) == [int(text[::-1], 2) for text in texts]


@examples
@given(a=integers("s32"), b=integers("s32"), p=st.lists(st.booleans(), min_size=32, max_size=32))
def test_comparison_combines_and_gives_both(a: np.ndarray, b: np.ndarray, p: list[bool]) -> None:
    inputs = {"%r1": ("s32", a), "%r2": ("s32", b), "%p3": ("pred", np.array(p))}
    text = """setp.lt.and.s32 %p0|%p1, %r1, %r2, !%p3; setp.lo.u32 %p2, %r1, %r2;
              selp.b32 %r0, %r1, 0x11, %p0; set.gt.u32.s32 %r3, %r1, %r2; not.pred %p4, %p3;"""
    outputs = {"%p0": "pred", "%p1": "pred", "%p2": "pred", "%r0": "s32", "%r3": "u32", "%p4": "pred"}
    got = execute(text, inputs, outputs)
    for i, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        assert got["%p0"][i] == (x < y and not p[i])
        assert got["%p1"][i] == (x >= y and not p[i])
        assert got["%p2"][i] == (x % 2**32 < y % 2**32)
        assert got["%r0"][i] == (x if x < y and not p[i] else 17)
        assert got["%r3"][i] == (0xFFFFFFFF if x > y else 0)
        assert got["%p4"][i] == (not p[i])


@examples
@given(a=integers("u64"))
def test_moves_split_and_join(a: np.ndarray) -> None:
    text = """mov.b64 {%r0, %r1}, %d1; mov.b64 {_, %r2}, %d1; mov.b64 %d0, {%r1, %r0};
              mov.b32 {%h0, %h1}, %r0; mov.b32 %r3, {%h1, %h0};
              { .reg .b32 t; mov.b32 t, %r1; mov.b32 %r4, t; } { .reg .b32 t; mov.b32 t, 7; mov.b32 %r5, t; }"""
    outputs = {"%r0": "u32", "%r1": "u32", "%r2": "u32", "%d0": "u64", "%r3": "u32", "%r4": "u32", "%r5": "u32"}
    got = execute(text, {"%d1": ("u64", a)}, outputs)
    for i, x in enumerate(a.tolist()):
        low, high = x & 0xFFFFFFFF, x >> 32
        assert [int(got[name][i]) for name in ("%r0", "%r1", "%r2")] == [low, high, high]
        assert got["%d0"][i] == low << 32 | high
        assert got["%r3"][i] == (low >> 16) | (low & 0xFFFF) << 16
        assert (got["%r4"][i], got["%r5"][i]) == (high, 7)


@examples
@given(a=integers("s32"), p=st.lists(st.booleans(), min_size=32, max_size=32))
def test_guards_leave_the_other_threads_alone(a: np.ndarray, p: list[bool]) -> None:
    text = "mov.b32 %r0, 5; @%p1 mov.b32 %r0, %r1; @!%p1 add.s32 %r0, %r0, 1; @%p1 setp.eq.s32 %p1, %r1, %r1;"
    got = execute(text, {"%r1": ("s32", a), "%p1": ("pred", np.array(p))}, {"%r0": "s32", "%p1": "pred"})
    assert got["%r0"].tolist() == [x if taken else 6 for x, taken in zip(a.tolist(), p, strict=True)]
    assert got["%p1"].tolist() == p

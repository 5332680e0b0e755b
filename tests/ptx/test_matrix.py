"""ldmatrix and mma against the ISA's fragment layouts, written out element by element."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.ptx import ConvergenceError, UninitialisedError, UnknownInstructionError

from .harness import examples, execute

# Where element i of a lane's fragment lies in its matrix: (row, column).


def a_m16n8k8(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (0 if i < 2 else 8), lane % 4 * 2 + i % 2


def b_m16n8k8(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 2 + i, lane // 4


def c_m16n8k8(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (0 if i < 2 else 8), lane % 4 * 2 + i % 2


def a_m8n8k16(lane: int, i: int) -> tuple[int, int]:
    return lane // 4, lane % 4 * 4 + i


def b_m8n8k16(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 4 + i, lane // 4


def c_m8n8k16(lane: int, i: int) -> tuple[int, int]:
    return lane // 4, lane % 4 * 2 + i


def fragment(matrix: np.ndarray, place, count: int) -> np.ndarray:
    """(32 lanes, count) elements."""
    return np.array([[matrix[place(lane, i)] for i in range(count)] for lane in range(32)], matrix.dtype)


def registers(elements: np.ndarray) -> list[np.ndarray]:
    """A fragment's 32-bit registers, each an array over lanes; the lower element in the lower bits."""
    return list(np.ascontiguousarray(elements).view(np.uint32).T)


def matrices(seed: int, *shapes: tuple[int, int]) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [(generator.standard_normal(shape) * 2.0 ** generator.integers(-4, 4, shape)) for shape in shapes]


def multiply(text: str, a: list, b: list, c: list, results: int, kind: str) -> list[np.ndarray]:
    inputs: dict[str, tuple[str, np.ndarray]] = {}
    names: list[list[str]] = []
    for values in (a, b, c):
        names.append([f"%r{len(inputs) + 10 + i}" for i in range(len(values))])
        inputs.update({name: ("b32", value.view(np.uint32)) for name, value in zip(names[-1], values, strict=True)})
    out = [f"%r{i}" for i in range(results)]
    operands = ", ".join("{" + ", ".join(group) + "}" for group in [out, *names])
    got = execute(f"{text} {operands};", inputs, dict.fromkeys(out, kind))
    return [got[name] for name in out]


@examples
@given(seed=st.integers(0, 2**32))
def test_m16n8k8_with_float32_accumulators(seed: int) -> None:
    a, b, c = matrices(seed, (16, 8), (8, 8), (16, 8))
    a, b, c = a.astype(np.float16), b.astype(np.float16), c.astype(np.float32)
    got = multiply(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32",
        registers(fragment(a, a_m16n8k8, 4)),
        registers(fragment(b, b_m16n8k8, 2)),
        registers(fragment(c, c_m16n8k8, 4)),
        4,
        "f32",
    )
    wanted = (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float32)
    # Exact but for the float64 sum's own rounding, far below float32's.
    np.testing.assert_array_max_ulp(np.stack(got, 1), fragment(wanted, c_m16n8k8, 4), 1)


@examples
@given(seed=st.integers(0, 2**32))
def test_m16n8k8_with_float16_accumulators(seed: int) -> None:
    a, b, c = (matrix.astype(np.float16) for matrix in matrices(seed, (16, 8), (8, 8), (16, 8)))
    got = multiply(
        "mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16",
        registers(fragment(a, a_m16n8k8, 4)),
        registers(fragment(b, b_m16n8k8, 2)),
        registers(fragment(c, c_m16n8k8, 4)),
        2,
        "f16x2",
    )
    wanted = (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float16)
    result = np.stack([pair.reshape(32, 2) for pair in got], 1).reshape(32, 4)
    np.testing.assert_array_max_ulp(result, fragment(wanted, c_m16n8k8, 4), 1)


@pytest.mark.parametrize("types", ["s8.s8", "u8.s8", "u8.u8"])
@pytest.mark.parametrize("saturates", [False, True])
@examples
@given(seed=st.integers(0, 2**32))
def test_m8n8k16_of_bytes(types: str, saturates: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = (
        generator.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)
        for dtype, shape in zip(
            [np.int8 if t == "s8" else np.uint8 for t in types.split(".")], [(8, 16), (16, 8)], strict=True
        )
    )
    c = generator.choice([-(2**31), 2**31 - 1, 0, 1234], (8, 8)).astype(np.int32)
    got = multiply(
        f"mma.sync.aligned.m8n8k16.row.col{'.satfinite' if saturates else ''}.s32.{types}.s32",
        registers(fragment(a, a_m8n8k16, 4)),
        registers(fragment(b, b_m8n8k16, 4)),
        registers(fragment(c, c_m8n8k16, 2)),
        2,
        "s32",
    )
    exact = a.astype(np.int64) @ b.astype(np.int64) + c
    wanted = np.clip(exact, -(2**31), 2**31 - 1) if saturates else exact
    assert np.array_equal(np.stack(got, 1), fragment(wanted.astype(np.int32), c_m8n8k16, 2))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@examples
@given(order=st.permutations(range(32)))
def test_ldmatrix(count: int, transposed: bool, order: list[int]) -> None:
    """Rows are scattered over shared memory: row r of matrix m is where thread 8 m + r says."""
    matrix = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(32, 8) + 1  # thread t's row
    text = f"""mov.b32 %r20, global_smem;
        shl.b32 %r21, %r1, 4; add.s32 %r20, %r20, %r21;
        st.shared.v4.b32 [%r20], {{%r10, %r11, %r12, %r13}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16
            {{{", ".join(f"%r{i}" for i in range(count))}}}, [%r20];"""
    rows = registers(matrix)
    inputs = {"%r1": ("u32", np.array(order)), **{f"%r{10 + i}": ("b32", row) for i, row in enumerate(rows)}}
    got = execute(text, inputs, {f"%r{i}": "b32" for i in range(count)}, shared_bytes=512)
    for m in range(count):
        block = matrix[8 * m : 8 * m + 8].T if transposed else matrix[8 * m : 8 * m + 8]
        # Lane l holds row l // 4, elements 2 (l % 4) and the next.
        wanted = [[int(block[lane // 4, lane % 4 * 2 + i]) for i in range(2)] for lane in range(32)]
        assert got[f"%r{m}"].view(np.uint16).reshape(32, 2).tolist() == wanted


def test_ldmatrix_of_unwritten_rows_names_the_thread_of_the_row() -> None:
    text = """mov.b32 %r20, global_smem; shl.b32 %r21, %tid32, 4; add.s32 %r20, %r20, %r21;
        setp.ne.u32 %p0, %tid32, 5; @%p0 st.shared.v4.b32 [%r20], {%r10, %r10, %r10, %r10}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r20];"""
    with pytest.raises(UninitialisedError) as error:
        execute(text, {}, {"%r0": "b32"}, shared_bytes=512)
    assert (error.value.thread, error.value.address) == (5, 80)


def test_mma_needs_the_whole_warp() -> None:
    text = """setp.ne.u32 %p0, %tid32, 9;
        @%p0 mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%r6}, {%r0,%r1,%r2,%r3};"""
    with pytest.raises(ConvergenceError) as error:
        execute(text, {}, {"%r0": "b32"})
    assert error.value.thread == 9


def test_shapes_of_later_gpus_are_unknown() -> None:
    with pytest.raises(UnknownInstructionError, match="m16n8k16"):
        execute(
            """mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
            {%r0,%r1,%r2,%r3}, {%r4,%r5,%r6,%r7}, {%r8,%r9}, {%r0,%r1,%r2,%r3};""",
            {},
            {"%r0": "b32"},
        )

"""The stage's PTX executed on the CPU, every access checked, against the same sums in float64."""

import importlib

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("tools.ptx", reason="the PTX interpreter is not here")

import triton.language as tl

from tools.offline import compile_jit

from . import kernels

INPUTS = {"a": "*fp16", "b": "*fp16", "c": "*fp32", "K": "i32"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def values(kind, *shape):
    """Random numbers as they lie in memory, and what they stand for."""
    numbers = np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)
    if kind == "i8":
        stored = np.round(numbers * 9).astype(np.int8)
        return stored, stored.astype(np.float64)
    if kind == "bf16":
        stored = (numbers.view(np.uint32) >> 16).astype(np.uint16)
        return stored, (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if kind == "fp8e5":
        stored = (numbers.astype(np.float16).view(np.uint16) >> 8).astype(np.uint8)
        return stored, (stored.astype(np.uint16) << 8).view(np.float16).astype(np.float64)
    stored = numbers.astype({"fp16": np.float16, "fp32": np.float32}[kind])
    return stored, stored.astype(np.float64)


def execute(kernel, types, constants, arguments, *, pipelined, divisible=True, **options):
    names = tuple(name for name, kind in types.items() if kind[0] == "*" or (divisible and name == "K"))
    compiled = compile_jit(kernel, types, constants, turing=True, divisible_by_16=names, **options)
    assert ("ttg.local_store" in compiled.ttgir) == pipelined
    assert "mma.sync" in compiled.ptx
    in_order = {name: arguments[name] for name in kernel.arg_names if name in types}
    importlib.import_module("tools.ptx").launch(compiled.ptx, (1,), in_order, shared_bytes=compiled.shared)


@pytest.mark.parametrize("num_warps", [4, 8])
@pytest.mark.parametrize("K", [96, 45, 31])
def test_matmul(K, num_warps):
    (a, a64), (b, b64) = values("fp16", 64, K), values("fp16", K, 64)
    c = np.zeros((64, 64), np.float32)
    arguments = {"a": a, "b": b, "c": c, "K": K}
    constants = {"OTHER": 1.5, "OUT": tl.float32}
    execute(kernels.matmul, INPUTS, constants, arguments, pipelined=True, divisible=K % 16 == 0, num_warps=num_warps)
    np.testing.assert_allclose(c, a64 @ b64, atol=2e-5)


def test_int8_is_exact():
    (a, a64), (b, b64) = values("i8", 64, 80), values("i8", 80, 64)
    c = np.zeros((64, 64), np.int32)
    types = {"a": "*i8", "b": "*i8", "c": "*i32", "K": "i32"}
    execute(kernels.matmul, types, {"OTHER": 3, "OUT": tl.int32}, {"a": a, "b": b, "c": c, "K": 80}, pipelined=True)
    assert np.array_equal(c, a64 @ b64)


def test_masked_loads_get_the_value_that_the_kernel_gives():
    """Only the left tile is masked: beyond K it is 1, and the sums of the right one's rows are added."""
    (a, a64), (b, b64) = values("fp16", 64, 200), values("fp16", 256, 64)
    c = np.zeros((64, 64), np.float32)
    execute(
        kernels.large_tiles, INPUTS, {"ROWS": 64}, {"a": a, "b": b, "c": c, "K": 200}, pipelined=True, divisible=False
    )
    np.testing.assert_allclose(c, a64 @ b64[:200] + b64[200:].sum(0), atol=4e-5)


@pytest.mark.parametrize("wide", ["bf16", "fp32", "fp8e5", "i8"])
def test_mixed_dots(wide):
    (a, a64), (b, b64) = values("fp16", 64, 96), values("fp16", 96, 64)
    (wide_a, wide_a64), (wide_b, wide_b64) = values(wide, 64, 96), values(wide, 96, 64)
    c = np.zeros((64, 64), np.float32)
    arguments = {"a": a, "b": b, "wide_a": wide_a, "wide_b": wide_b, "c": c, "K": 96}
    types = {**INPUTS, "wide_a": f"*{wide}", "wide_b": f"*{wide}"}
    out = tl.int32 if wide == "i8" else tl.float32
    execute(kernels.two_dots, types, {"OUT": out}, arguments, pipelined=True)
    np.testing.assert_allclose(c, a64 @ b64 + wide_a64 @ wide_b64, atol=1e-4, rtol=1e-6)


def test_a_loop_sees_its_own_stores():
    """Each iteration stores its tile where the next one loads: all of them multiply by the first."""
    (a, a64), (b, b64) = values("fp16", 64 * 96 + 32), values("fp16", 96, 64)
    expected = sum(a64[np.arange(64)[:, None] * 96 + np.arange(32)] @ b64[s : s + 32] for s in (0, 32, 64))
    c = np.zeros((64, 64), np.float32)
    execute(kernels.writes, INPUTS, {"HOW": "store"}, {"a": a, "b": b, "c": c, "K": 96}, pipelined=False)
    # A row's last tile is stored over the next row's first after that one was loaded.
    np.testing.assert_allclose(c, expected, atol=2e-5)


def test_a_pipelined_loop_sees_the_stores_before_it():
    (a, a64), (b, b64) = values("fp16", 64, 64), values("fp16", 64, 64)
    c = np.zeros((3, 64, 64), np.float32)
    arguments = {"a": a, "b": b, "c": c, "K": 64, "N": 3}
    execute(kernels.writes_between_loops, {**INPUTS, "N": "i32"}, {}, arguments, pipelined=True)
    for result in c:
        a64[:, :32] *= 2
        np.testing.assert_allclose(result, a64 @ b64, atol=5e-5)

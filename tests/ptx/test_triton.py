"""Triton kernels, compiled for sm_75 and executed from end to end; and faults planted in their PTX."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs Triton to compile kernels for sm_75")

from tools.ptx import OutOfBoundsError, RaceError, launch, launch_triton

from . import kernels

D, BLOCK = 64, 64
SCALE = D**-0.5


def test_add_with_a_ragged_end() -> None:
    compiled = kernels.build(
        kernels.add_kernel, {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32"}, {"BLOCK": 256}
    )
    x, y = np.random.default_rng(0).standard_normal((2, 1000)).astype(np.float32)
    out = np.zeros(1000, np.float32)
    counters = launch_triton(compiled, (4,), {"x": x, "y": y, "out": out, "n": 1000})
    assert np.array_equal(out, x + y)
    assert counters.buffers["x"].bytes_read == 4000
    assert counters.buffers["out"].bytes_written == 4000
    assert counters.global_bytes == 3 * 4000


@pytest.mark.parametrize("num_warps", [1, 4])
def test_softmax_reduces_across_warps(num_warps: int) -> None:
    signature = {"x": "*fp32", "out": "*fp32", "columns": "i32"}
    compiled = kernels.build(kernels.softmax_kernel, signature, {"BLOCK": 512}, num_warps=num_warps)
    x = np.random.default_rng(0).standard_normal((3, 500)).astype(np.float32)
    out = np.zeros_like(x)
    counters = launch_triton(compiled, (3,), {"x": x, "out": out, "columns": 500})
    wanted = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(out, wanted / wanted.sum(1, keepdims=True), rtol=1e-6)
    assert counters.instructions["shuffle"] > 0
    assert (counters.barriers > 0) == (num_warps > 1)


def test_histogram_by_atomics() -> None:
    compiled = kernels.build(kernels.histogram_kernel, {"x": "*i32", "counts": "*i32", "n": "i32"}, {"BLOCK": 256})
    x = np.random.default_rng(0).integers(0, 7, 600).astype(np.int32)
    counts = np.zeros(7, np.int32)
    launch_triton(compiled, (3,), {"x": x, "counts": counts, "n": 600})
    assert np.array_equal(counts, np.bincount(x))


def test_scan() -> None:
    compiled = kernels.build(kernels.scan_kernel, {"x": "*i32", "out": "*i32"}, {"BLOCK": 512})
    x = np.random.default_rng(0).integers(-9, 9, 512).astype(np.int32)
    out = np.zeros_like(x)
    launch_triton(compiled, (1,), {"x": x, "out": out})
    assert np.array_equal(out, np.cumsum(x))


def test_a_loop_as_long_as_the_data_asks() -> None:
    def steps(n: int) -> int:
        return 0 if n <= 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    compiled = kernels.build(kernels.collatz_kernel, {"x": "*i32", "out": "*i32"}, {"BLOCK": 128})
    x = np.arange(128, dtype=np.int32)
    out = np.zeros_like(x)
    launch_triton(compiled, (1,), {"x": x, "out": out})
    assert out.tolist() == [steps(n) for n in range(128)]


# Attention: the tensor-core kernel, stock Triton's scalar one, and faults planted in the first.


@pytest.fixture(scope="module", params=["tensor cores", "scalar"])
def attention(request: pytest.FixtureRequest):
    return _build_attention(request.param == "tensor cores")


def _build_attention(tensor_cores: bool):
    signature = {
        "q": "*fp16",
        "k": "*fp16",
        "v": "*fp16",
        "out": "*fp16",
        "lse": "*fp32",
        "length": "i32",
        "scale": "fp32",
    }
    return kernels.build(kernels.attention_kernel, signature, {"BLOCK": BLOCK, "D": D}, tensor_cores=tensor_cores)


@pytest.fixture(scope="module")
def kernel():
    return _build_attention(True)


def _inputs(length: int) -> dict[str, np.ndarray]:
    q, k, v = np.random.default_rng(length).standard_normal((3, length, D)).astype(np.float16)
    # NaN where nothing is written: a row left out shows.
    return {"q": q, "k": k, "v": v, "out": np.full_like(q, np.nan), "lse": np.full(length, np.nan, np.float32)}


def _run(compiled, length: int, ptx: str | None = None):
    arguments = _inputs(length)
    grid = (-(-length // BLOCK),)
    every = {**arguments, "length": length, "scale": SCALE}
    counters = launch(ptx or compiled.asm["ptx"], grid, every, shared_bytes=compiled.metadata.shared)
    return arguments["out"], arguments["lse"], counters


def _reference(length: int) -> tuple[np.ndarray, np.ndarray]:
    arguments = _inputs(length)
    q, k, v = (arguments[name].astype(np.float64) for name in "qkv")
    scores = np.where(np.tri(length, dtype=bool), q @ k.T * SCALE, -np.inf)
    weights = np.exp(scores)
    total = weights.sum(1, keepdims=True)
    return weights @ v / total, np.log(total[:, 0])


def _agrees(length: int, out: np.ndarray, lse: np.ndarray) -> bool:
    """Within what rounding the weights and the result to fp16 can do to values below 4."""
    wanted_out, wanted_lse = _reference(length)
    return bool(np.all(np.abs(out - wanted_out) < 4e-3) and np.all(np.abs(lse - wanted_lse) < 1e-5))


@pytest.mark.parametrize("length", [64, 200])
def test_attention_agrees_with_float64(attention, length: int) -> None:
    out, lse, _ = _run(attention, length)
    assert _agrees(length, out, lse)


def test_tensor_core_and_scalar_kernels_agree_and_repeat_themselves() -> None:
    fast, scalar = _build_attention(True), _build_attention(False)
    out, lse, counters = _run(fast, 130)
    again, lse_again, _ = _run(fast, 130)
    assert np.array_equal(out, again)
    assert np.array_equal(lse, lse_again)
    slow, lse_slow, scalar_counters = _run(scalar, 130)
    assert np.max(np.abs(out.astype(np.float32) - slow)) < 2e-3
    assert np.max(np.abs(lse - lse_slow)) < 1e-6
    assert scalar_counters.instructions["tensor"] == 0
    # Two products of 64 x 64 x 64 a tile, 1 + 2 + 3 tiles in the three blocks.
    assert counters.tensor_flops == 6 * 2 * 2 * 64**3


def test_a_block_over_eight_key_tiles_takes_less_than_two_seconds(kernel) -> None:
    arguments = {**_inputs(8 * BLOCK), "length": 8 * BLOCK, "scale": SCALE}
    start = time.process_time()
    counters = launch_triton(kernel, (8,), arguments, blocks=[(7, 0, 0)])
    assert time.process_time() - start < 2
    assert counters.tensor_flops == 8 * 2 * 2 * BLOCK**2 * D


def _replace_once(ptx: str, pattern: str, replacement: str, which: int = 0) -> str:
    matches = list(re.finditer(pattern, ptx))
    assert len(matches) > which, f"the kernel has no {pattern!r} to plant a fault in"
    match = matches[which]
    return ptx[: match.start()] + match.expand(replacement) + ptx[match.end() :]


@pytest.mark.parametrize("first", [0, 8])
def test_planted_mask_off_by_one(kernel, first: int) -> None:
    """One of a thread's causal comparisons made strict: it loses the diagonal there. Triton chooses which."""
    pattern, ptx = r"setp\.([lg])e(\.[su](?:32|64))", kernel.asm["ptx"]
    assert len(re.findall(pattern, ptx)) > 16
    faulty = (_replace_once(ptx, pattern, r"setp.\1t\2", which) for which in range(first, first + 8))
    assert not all(_agrees(64, *_run(kernel, 64, text)[:2]) for text in faulty)


@pytest.mark.parametrize("which", [0, 20, -1])
def test_planted_swap_of_fragment_registers(kernel, which: int) -> None:
    ptx = kernel.asm["ptx"]
    pattern = r"(mma\.sync[^{]*\{[^}]*\}, )\{ (%r\d+), (%r\d+) \}"
    swapped = _replace_once(ptx, pattern, r"\1{ \3, \2 }", which % len(re.findall(pattern, ptx)))
    assert swapped != ptx
    out, lse, _ = _run(kernel, 64, swapped)
    assert not _agrees(64, out, lse)


def test_planted_absence_of_each_barrier(kernel) -> None:
    """No barrier of the loop may go: each stands between a write and a read, or a read and the next write."""
    ptx = kernel.asm["ptx"]
    loop = re.search(r"^(\$L__BB\d+_\d+):.*?bra\s+\1;", ptx, re.DOTALL | re.MULTILINE)
    assert loop is not None
    barriers = list(re.finditer(r"bar\.sync\s+0;", loop[0]))
    assert len(barriers) > 4
    for barrier in barriers:
        start, end = (loop.start() + place for place in barrier.span())
        with pytest.raises(RaceError) as error:
            _run(kernel, 128, ptx[:start] + ptx[end:])
        assert error.value.instruction is not None
        assert error.value.thread is not None


def test_planted_store_past_the_end(kernel) -> None:
    ptx = _replace_once(kernel.asm["ptx"], r"@%p\d+ (st\.global\.v4\.b32)", r"\1", 3)
    with pytest.raises(OutOfBoundsError, match=r"'out'.*st\.global\.v4\.b32") as fault:
        _run(kernel, 40, ptx)
    assert fault.value.block == (0, 0, 0)

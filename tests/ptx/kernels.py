"""Small Triton kernels, and their compilation for sm_75 without a GPU: by stock Triton, or with tensor cores."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n) + tl.load(y + at, mask=at < n), mask=at < n)


@triton.jit
def softmax_kernel(x, out, columns, BLOCK: tl.constexpr):
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    scores = tl.load(x + row * columns + at, mask=at < columns, other=-float("inf"))
    weights = tl.exp(scores - tl.max(scores, axis=0))
    tl.store(out + row * columns + at, weights / tl.sum(weights, axis=0), mask=at < columns)


@triton.jit
def histogram_kernel(x, counts, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(counts + tl.load(x + at, mask=at < n, other=0), 1, mask=at < n)


@triton.jit
def scan_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.cumsum(tl.load(x + at), axis=0))


@triton.jit
def collatz_kernel(x, out, BLOCK: tl.constexpr):
    """A loop whose length depends on data: the block runs until its last element is done."""
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    steps = tl.zeros([BLOCK], tl.int32)
    while tl.max(value, axis=0) > 1:
        steps += (value > 1).to(tl.int32)
        value = tl.where(value > 1, tl.where(value % 2 == 0, value // 2, 3 * value + 1), value)
    tl.store(out + at, steps)


@triton.jit
def attention_kernel(q, k, v, out, lse, length, scale, BLOCK: tl.constexpr, D: tl.constexpr):
    """Causal attention of one head: q, k, v, out (length, D), lse (length)."""
    rows, columns, depth = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, D)
    queries = tl.load(q + rows[:, None] * D + depth[None, :], mask=rows[:, None] < length, other=0.0)
    highest = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, D], tl.float32)
    for start in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
        at = start + columns
        keys = tl.load(k + at[:, None] * D + depth[None, :], mask=at[:, None] < length, other=0.0)
        values = tl.load(v + at[:, None] * D + depth[None, :], mask=at[:, None] < length, other=0.0)
        scores = tl.dot(queries, tl.trans(keys)) * scale
        scores = tl.where((rows[:, None] >= at[None, :]) & (at[None, :] < length), scores, -1e30)
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_highest[:, None])
        shrink = tl.exp(highest - new_highest)
        total = total * shrink + tl.sum(weights, axis=1)
        sums = tl.dot(weights.to(tl.float16), values, sums * shrink[:, None])
        highest = new_highest
    outputs = (sums / total[:, None]).to(tl.float16)
    tl.store(out + rows[:, None] * D + depth[None, :], outputs, mask=rows[:, None] < length)
    tl.store(lse + rows, highest + tl.log(total), mask=rows < length)


def build(
    function: Any,
    signature: dict[str, str],
    constants: dict[str, int],
    *,
    num_warps: int = 4,
    tensor_cores: bool = False,
) -> Any:
    """Compiles for sm_75. Pointers are taken to be multiples of 16 bytes, as PyTorch's allocations are."""
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(
        fn=function,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    options = {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": True}
    with _tensor_cores() if tensor_cores else contextlib.nullcontext():
        return triton.compile(source, target=GPUTarget("cuda", 75, 32), options=options)


@contextlib.contextmanager
def _tensor_cores() -> Iterator[None]:
    """Lets the layout of Turing's mma be chosen, which Triton keeps from GPUs below sm_80 but can still lower."""

    def turing_layout(backend: Any, options: Any, module: Any, metadata: Any) -> Any:
        context = module.context
        text = str(backend.make_ttgir(module, metadata, dataclasses.replace(options, num_stages=1), 80))
        text = text.replace("versionMajor = 2, versionMinor = 0", "versionMajor = 2, versionMinor = 1")
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "module.ttgir")
            path.write_text(text.replace('"cuda:80"', '"cuda:75"'))
            module = ir.parse_mlir_module(str(path), context)
        module.context = context
        return module

    def hook(backend: Any = None, stages: Any = None, options: Any = None, *_: Any, **__: Any) -> Any:
        if backend is None:
            return "turing layout", "1"  # part of the cache's key
        stages["ttgir"] = lambda module, metadata: turing_layout(backend, options, module, metadata)
        return None

    with knobs.runtime.scope(), knobs.cache.scope():
        knobs.runtime.add_stages_inspection_hook = hook
        # Triton 3.6 leaves the hook out of the key of what triton.compile compiles: a cache of its own.
        knobs.cache.dir = str(pathlib.Path(knobs.cache.dir, "turing layout"))
        yield

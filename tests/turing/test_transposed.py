"""Transposed dot operands come from the buffer that the tile lies in already, and are what they were."""

import importlib

import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is not installed")

from compiled_fa_turing import ir_text, transposed
from tools.offline import compile_jit

from . import large_kernels

NAMED = {"q": "*fp16", "k": "*fp16", "out": "*fp32", "seqlen": "i32"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def twice(head_dim, num_stages=1):
    return compile_jit(large_kernels.twice, NAMED, {"D": head_dim}, turing=True, num_stages=num_stages)


def test_a_tile_lies_in_shared_memory_once(monkeypatch):
    with_it = twice(64)
    monkeypatch.setattr(transposed, "from_shared_memory", lambda module, late: False)
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    without = twice(64)
    assert "memdesc_trans" in with_it.ttgir
    assert "memdesc_trans" not in without.ttgir
    assert with_it.hmma == without.hmma
    assert with_it.shared <= without.shared
    assert with_it.barriers < without.barriers
    assert with_it.count("STS") < without.count("STS")


@pytest.mark.parametrize("num_stages", [1, 2])
def test_what_is_computed(num_stages):
    random = np.random.default_rng(num_stages)
    q, k = (random.standard_normal((rows, 32)).astype(np.float16) for rows in (32, 80))
    out = np.zeros((32, 32), np.float32)
    compiled = twice(32, num_stages)
    arguments = {"q": q, "k": k, "out": out, "seqlen": 80}
    importlib.import_module("tools.ptx").launch(compiled.ptx, (1,), arguments, shared_bytes=compiled.shared)
    scores = (q.astype(np.float64) @ k.astype(np.float64).T).astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(out, scores @ k.astype(np.float64), atol=2e-1)
    assert np.abs(out - scores @ k.astype(np.float64)).mean() < 5e-3


MODULE = """#blocked = #ttg.blocked<{order = [0, 1]}>
#linear = #ttg.linear<{block = []}>
#mma = #ttg.nvidia_mma<{versionMajor = 2}>
#shared = #ttg.swizzled_shared<{vec = 8, perPhase = 1, maxPhase = 4, order = [0, 1]}>
#smem = #ttg.shared_memory
module {
  tt.func public @kernel(%p: i32) {
    %k = tt.load %pointers : tensor<64x32x!tt.ptr<f16>, #blocked>
    %buffer = ttg.local_alloc %k : (tensor<64x32xf16, #blocked>) -> !ttg.memdesc<64x32xf16, #shared, #smem>
    %c = ttg.convert_layout %k : tensor<64x32xf16, #blocked> -> tensor<64x32xf16, #linear>
    %t = tt.trans %c {order = array<i32: 1, 0>} : tensor<64x32xf16, #linear> -> tensor<32x64xf16, #ttg.dot_op<{opIdx = 1, parent = #mma, kWidth = 2}>> loc(#loc7)
    %x = arith.addf %y, %y : tensor<64x32xf32, #mma>
    %z = tt.dot %a, %t, %x : tensor<64x32xf16, #mma> * tensor<32x64xf16, #mma> -> tensor<64x64xf32, #mma>
    tt.return
  }
}"""  # noqa: E501


def rewritten(text, late):
    module = ir_text.parse(text)
    found = transposed.from_shared_memory(module, late)
    return found, str(module).split("\n")


@pytest.mark.parametrize("late", [False, True])
def test_rewriting(late):
    found, lines = rewritten(MODULE, late)
    assert found
    assert "#turing_shared = #ttg.swizzled_shared<{vec = 8, perPhase = 1, maxPhase = 4, order = [1, 0]}>" in lines
    body = [line.strip() for line in lines]
    turned = (
        "%turing_turned_t = ttg.memdesc_trans %buffer {order = array<i32: 1, 0>} : "
        "!ttg.memdesc<64x32xf16, #shared, #smem> -> !ttg.memdesc<32x64xf16, #turing_shared, #smem> loc(#loc7)"
    )
    assert turned in body
    assert body[body.index(turned) + 1].startswith("%t = ttg.local_load %turing_turned_t : ")
    assert not any("convert_layout" in line or "tt.trans" in line for line in body)
    moved = body.index(turned) > next(i for i, line in enumerate(body) if line.startswith("%x"))
    assert moved == late


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("xf16, #shared, #smem>", "xf16, #shared, #smem, mutable>"),  # a buffer that others write
        ("ttg.local_alloc %k :", "ttg.local_alloc %other :"),  # another tile
        ("%x = arith.addf %y, %y :", "%x = arith.addf %c, %c :"),  # the conversion has another use
        ("#shared = #ttg.swizzled_shared", "#shared = #ttg.padded_shared"),
        ("f16, ", "f8E5M2, "),  # ldmatrix transposes 16 bits
        ("{order = array<i32: 1, 0>}", "{order = array<i32: 0, 1>}"),
    ],
)
def test_what_is_left_alone(old, new):
    text = MODULE.replace(old, new)
    assert text != MODULE
    for late in (False, True):
        found, lines = rewritten(text, late)
        assert not found
        assert lines == text.split("\n")

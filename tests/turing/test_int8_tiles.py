"""Tiles that fill the registers: what libraries choose, compiled with the stage for sm_75."""

import re
import types

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl

from compiled_fa_turing import triton_private
from tools.offline import compile_jit

from . import large_kernels


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def gemm(kind, wide, transposed, block):
    named = {"a": f"*{kind}", "b": f"*{kind}", "c": f"*{wide}", "K": "i32", "stride_am": "i32", "stride_cm": "i32"}
    named["stride_bn" if transposed else "stride_bk"] = "i32"
    out = {"i32": tl.int32, "fp32": tl.float32}[wide]
    constants = {"OUT": out, "BLOCK": block, "stride_bk" if transposed else "stride_bn": 1}
    return compile_jit(large_kernels.gemm, named, constants, turing=True, divisible_by_16=tuple(named))


def scaled_gemm(block):
    named = {"a": "*i8", "b": "*i8", "scale_a": "*fp32", "scale_b": "*fp32", "c": "*fp16"}
    named |= dict.fromkeys(("M", "N", "K", "stride_am", "stride_bn", "stride_cm"), "i32")
    return compile_jit(large_kernels.scaled_gemm, named, {"BLOCK": block}, turing=True, divisible_by_16=tuple(named))


@pytest.mark.parametrize("transposed", [False, True], ids=["b", "b transposed"])
def test_int8_tiles_do_not_spill(transposed):
    """Where the fp16 tile has room, the int8 one, of half the bytes, has too; and it is pipelined."""
    compiled = gemm("i8", "i32", transposed, 32)
    assert compiled.imma == 128
    assert compiled.spills == 0
    assert "ttg.local_store" in compiled.ttgir


def test_an_int8_tile_with_scales_and_masks_does_not_spill():
    compiled = scaled_gemm(32)
    assert (compiled.imma, compiled.spills) == (128, 0)


def test_operands_of_bytes_are_not_carried_around_the_loop():
    """Element by element they would take four times the registers that they fill."""
    assert not re.search(r"scf\.for .* iter_args\(.*dot_op", gemm("i8", "i32", True, 64).ttgir)


passes = types.SimpleNamespace(
    ttgpuir=types.SimpleNamespace(
        add_pipeline=lambda module: module.append("pipeline"), add_prefetch=lambda module: module.append("prefetch")
    )
)


def lower(module, metadata, options, capability):
    """Finds its passes where Triton's own function does: in its module."""
    passes.ttgpuir.add_pipeline(module)
    passes.ttgpuir.add_prefetch(module)
    return module


def test_prefetch_is_left_out_of_a_copy():
    """Another thread may be compiling for another GPU with the same function."""
    backend = types.SimpleNamespace(make_ttgir=lower)
    assert triton_private.make_ttgir(backend, [], {}, None, 80, prefetch=False) == ["pipeline"]
    assert triton_private.make_ttgir(backend, [], {}, None, 80, prefetch=True) == ["pipeline", "prefetch"]
    assert lower([], {}, None, 80) == ["pipeline", "prefetch"]


def test_a_lowering_that_is_no_function_is_called_as_it_is():
    class Lowering:
        def __call__(self, module, metadata, options, capability):
            return module, capability

    backend = types.SimpleNamespace(make_ttgir=Lowering())
    assert triton_private.make_ttgir(backend, "module", {}, None, 80, prefetch=False) == ("module", 80)

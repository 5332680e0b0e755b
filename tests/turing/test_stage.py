"""What the Turing stage makes of kernels compiled for sm_75: their instructions, and the structure of their loops."""

import itertools
import re
import warnings

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from triton import knobs

from compiled_fa_turing import ir_text
from tools.offline import compile_jit
from tools.offline.machine_code import inner_loops

from . import kernels


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def signature(a="fp16", c="fp32", **more):
    return {"a": f"*{a}", "b": f"*{a}", "c": f"*{c}", "K": "i32", **more}


def compile_(kernel, types, constants=None, *, warns=None, **options):
    """With the stage; any warning but the one expected fails, since falling back always warns."""
    divisible = tuple(name for name, kind in types.items() if kind[0] == "*" or name == "K")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = compile_jit(kernel, types, constants, turing=True, divisible_by_16=divisible, **options)
    messages = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    assert bool(messages) == bool(warns), messages
    assert all(re.search(warns, message) for message in messages)
    return compiled


def is_pipelined(compiled):
    return "ttg.local_store" in compiled.ttgir


def matrix_instructions(compiled):
    return set(re.findall(r"mma\.sync\.aligned\.(m\w+)\.row\.col(?:\.satfinite)?\.([\w.]+)", compiled.ptx))


@pytest.mark.parametrize(
    ("a", "c", "out", "instruction"),
    [
        ("fp16", "fp32", tl.float32, ("m16n8k8", "f32.f16.f16.f32")),
        ("fp16", "fp16", tl.float16, ("m16n8k8", "f16.f16.f16.f16")),
        ("i8", "i32", tl.int32, ("m8n8k16", "s32.s8.s8.s32")),
    ],
    ids=["fp16", "fp16 accumulated in fp16", "int8"],
)
def test_dots_on_tensor_cores(a, c, out, instruction):
    compiled = compile_(kernels.matmul, signature(a, c), {"OTHER": 0, "OUT": out})
    assert matrix_instructions(compiled) == {instruction}
    assert compiled.hmma + compiled.imma == 32  # 64x64x32 by 4 warps
    assert compiled.ffma == 0


def test_stock_triton_has_no_tensor_cores():
    """The reason for all this: if it fails, Triton has learned it again, and the stage may go."""
    types = {"a": "*fp16", "b": "*fp16", "c": "*fp32"}
    stock = compile_jit(kernels.batched, types, turing=False)
    assert (stock.hmma, stock.ffma) == (0, 1024)
    assert compile_(kernels.batched, types).hmma == 32


@pytest.mark.parametrize(
    ("a", "out"), [("bf16", tl.float32), ("fp32", tl.float32), ("fp64", tl.float64)], ids=["bf16", "fp32", "fp64"]
)
def test_dots_that_turing_lacks_are_left_to_triton(a, out):
    types = signature(a, "fp64" if a == "fp64" else "fp32")
    constants = {"OTHER": 0, "OUT": out}
    compiled = compile_(kernels.matmul, types, constants)
    with_stage, stock = compiled.ttgir, compile_jit(kernels.matmul, types, constants, turing=False).ttgir
    assert not matrix_instructions(compiled)
    assert with_stage.count("tt.dot") == stock.count("tt.dot") == 1
    assert "nvidia_mma" not in with_stage


@pytest.mark.parametrize(
    ("wide", "out", "fma", "hmma", "imma"),
    [
        ("bf16", tl.float32, 1024, 32, 0),
        ("fp32", tl.float32, 1024, 32, 0),
        ("fp8e5", tl.float32, 0, 64, 0),
        ("i8", tl.int32, 0, 32, 32),
    ],
)
def test_mixed_dots_keep_their_tensor_cores(wide, out, fma, hmma, imma):
    types = signature(wide_a=f"*{wide}", wide_b=f"*{wide}")
    compiled = compile_(kernels.two_dots, types, {"OUT": out})
    assert (compiled.ffma, compiled.hmma, compiled.imma) == (fma, hmma, imma)
    assert all(instruction[0] in ("m16n8k8", "m8n8k16") for instruction in matrix_instructions(compiled))


def test_bf16_and_fp8_are_widened_exactly_before_the_dot():
    bf16 = compile_(kernels.two_dots, signature(wide_a="*bf16", wide_b="*bf16"), {"OUT": tl.float32}).ttgir
    assert len(re.findall(r"arith\.extf .* : tensor<\S+xbf16, .*> to tensor<\S+xf32", bf16)) == 2
    fp8 = compile_(kernels.two_dots, signature(wide_a="*fp8e5", wide_b="*fp8e5"), {"OUT": tl.float32}).ttgir
    assert len(re.findall(r"tt\.fp_to_fp .* : tensor<\S+xf8E5M2, .*> -> tensor<\S+xf16", fp8)) == 2


def test_fp16_beside_fp64_takes_the_stock_path_and_says_so(monkeypatch):
    monkeypatch.setattr("compiled_fa_turing.stage._warned", set())
    types = signature(wide_a="*fp64", wide_b="*fp64")
    compiled = compile_(kernels.two_dots, types, {"OUT": tl.float64}, warns="without tensor cores: a dot of f64")
    assert not matrix_instructions(compiled)
    compile_(kernels.two_dots, types, {"OUT": tl.float64}, num_warps=2)  # the second time it keeps quiet


def test_scaled_dots_take_the_stock_path(monkeypatch):
    monkeypatch.setattr("compiled_fa_turing.stage._warned", set())
    types = {"a": "*fp8e5", "b": "*fp16", "scales": "*u8", "c": "*fp32"}
    assert not matrix_instructions(compile_(kernels.scaled, types, warns="a scaled dot"))


def test_a_kernel_without_dots_is_not_touched():
    types = signature()
    assert (
        compile_(kernels.scale, types).ptx
        == compile_jit(kernels.scale, types, turing=False, divisible_by_16=("a", "b", "c", "K")).ptx
    )


def body_of_the_loop(compiled):
    (loop,) = [op for op in ir_text.parse(compiled.ttgir).operations() if op.name == "scf.for"]
    return [item for item in loop.regions[0] if isinstance(item, ir_text.Operation)]


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        (kernels.matmul, {"OTHER": 0, "OUT": tl.float32}),
        (kernels.cache_hints, None),
        (kernels.stages_of_its_own, {"STAGES": 4}),
    ],
)
def test_a_pipelined_loop(kernel, constants):
    """Loads at the top; then, around the loop: the tile is read, a barrier, the next one is stored, a barrier."""
    compiled = compile_(kernel, signature(), constants)
    assert "async" not in compiled.ttgir.replace("!ttg.async.token", "")
    body = body_of_the_loop(compiled)
    names = [operation.name for operation in body]
    loaded = [operation.results[0] for operation in body if operation.name == "tt.load"]
    stored = [operation.operands[:2] for operation in body if operation.name == "ttg.local_store"]
    assert [value for value, _ in stored] == loaded
    assert len({buffer for _, buffer in stored}) == len(loaded) == 2
    assert max(i for i, name in enumerate(names) if name == "tt.load") < names.index("tt.dot")
    assert names.index("tt.dot") < names.index("ttg.local_store")
    (loop,) = [loop for loop in inner_loops(compiled.sass) if loop.counts["HMMA"]]
    memory = [i.opcode for i in loop.instructions if i.opcode in ("LDG", "LDSM", "STS", "BAR")]
    phases = [opcode for opcode, _ in itertools.groupby(memory)]
    assert phases[0] == "LDG"  # Triton 3.7 and later read the first part of the new tile at the end of the iteration
    assert phases[1:] in (["BAR", "LDSM", "BAR", "STS"], ["LDSM", "BAR", "STS", "BAR", "LDSM"])


def test_masked_loads_keep_their_values():
    """Zeros where the kernel gives no value (y), its own value where it does (x), in the loop and before it."""
    compiled = compile_(kernels.matmul, signature(), {"OTHER": 1.5, "OUT": tl.float32})
    constants = dict(re.findall(r"(%\S+) = arith\.constant dense<(\S+)> : tensor<\d+x\d+xf16", compiled.ttgir))
    loads = re.findall(r"= tt\.load %\S+, %\S+, (%[^ ,]+)", compiled.ttgir)
    assert sorted(float(constants[other]) for other in loads) == [0, 0, 1.5, 1.5]
    assert compiled.ttgir.count("tt.load") == 4  # of x and y, before the loop and in it
    # Beyond K, the tile in shared memory is replaced by the kernel's own value once more.
    assert re.search(r"arith\.select .*xf16", compiled.ttgir)


def test_masked_int8_loads_are_filled_with_zeros():
    compiled = compile_(kernels.matmul, signature("i8", "i32"), {"OTHER": 0, "OUT": tl.int32})
    constants = dict(re.findall(r"(%\S+) = arith\.constant dense<(\S+)> : tensor<\d+x\d+xi8", compiled.ttgir))
    loads = re.findall(r"= tt\.load %\S+, %\S+, (%[^ ,]+)", compiled.ttgir)
    assert {constants[other] for other in loads} == {"0"}


@pytest.mark.parametrize("how", ["store", "store under a condition", "atomic", "assembly", "barrier", "call"])
def test_a_loop_that_may_write_is_not_pipelined(how):
    """Nor if the loop itself asks for stages, as this one does."""
    compiled = compile_(kernels.writes, signature(), {"HOW": how})
    assert compiled.hmma == 32
    assert not is_pipelined(compiled)


def test_the_same_loop_without_a_write_is_pipelined():
    assert is_pipelined(compile_(kernels.writes, signature(), {"HOW": "nothing"}))


def test_volatile_loads_are_not_pipelined():
    compiled = compile_(kernels.volatile, signature())
    assert compiled.hmma == 32
    assert not is_pipelined(compiled)


def test_loops_that_ask_to_be_flattened_stay_nested():
    """The inner one, which only loads, is pipelined; the store stays in the outer one."""
    compiled = compile_(kernels.flattened, signature(N="i32"))
    assert compiled.hmma == 32
    outer, inner = [op for op in ir_text.parse(compiled.ttgir).operations() if op.name == "scf.for"]
    assert "ttg.local_store" in [operation.name for operation in inner.inside()]
    assert "tt.store" in [operation.name for operation in outer.inside()]
    assert "tt.store" not in [operation.name for operation in inner.inside()]


@pytest.mark.parametrize(
    ("num_stages", "of_the_loop", "pipelined"), [(1, 1, False), (3, 1, False), (1, 2, True), (3, 4, True)]
)
def test_the_number_of_stages_is_obeyed_up_to_two(num_stages, of_the_loop, pipelined):
    compiled = compile_(kernels.stages_of_its_own, signature(), {"STAGES": of_the_loop}, num_stages=num_stages)
    assert is_pipelined(compiled) == pipelined
    assert compiled.shared == 8192  # one buffer an operand, whatever is asked


def test_no_pipeline_where_its_buffers_do_not_fit():
    assert is_pipelined(compile_(kernels.large_tiles, signature(), {"ROWS": 64}))
    large = compile_(kernels.large_tiles, signature(), {"ROWS": 128}, num_warps=8)
    assert not is_pipelined(large)
    assert large.shared <= 65536


def test_an_unknown_shape_of_line_means_no_pipeline(monkeypatch):
    """What pipeline.py cannot read is compiled without pipelining, with tensor cores, and with a warning."""
    monkeypatch.setattr("compiled_fa_turing.stage._warned", set())
    monkeypatch.setattr("compiled_fa_turing.pipeline._COPY", re.compile("nothing"))
    compiled = compile_(kernels.cache_hints, signature(), warns="could not lower a kernel with num_stages=2: copy")
    assert compiled.hmma == 32
    assert not is_pipelined(compiled)


def test_an_unknown_shape_of_dot_means_stock_triton(monkeypatch):
    monkeypatch.setattr("compiled_fa_turing.stage._warned", set())
    monkeypatch.setattr("compiled_fa_turing.dots.Dot._LINE", re.compile("nothing"))
    compiled = compile_(kernels.cache_hints, signature(), warns="without tensor cores: dot")
    assert compiled.hmma == 0
    assert compiled.ffma


def test_other_gpus_are_not_touched():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tools.offline.compile import stage

    source = ASTSource(kernels.batched, signature={"a": "*fp16", "b": "*fp16", "c": "*fp32"})
    texts = []
    for turing in (False, True):
        with stage(turing):
            texts.append(triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ttgir"])
    assert str(texts[0]) == str(texts[1])
    assert knobs.runtime.add_stages_inspection_hook is None

"""The rewriting of Triton's text, line by line; no Triton needed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiled_fa_turing import dots, ir_text, pipeline
from compiled_fa_turing.ir_text import UnexpectedIRError

PTR = "tensor<64x32x!tt.ptr<f16>, #blocked>"


def module(*lines):
    body = "\n".join(f"    {line}" for line in lines)
    return ir_text.parse(
        f"#loc = loc(unknown)\nmodule {{\n  tt.func public @f() {{\n{body}\n  }} loc(#loc)\n}} loc(#loc)\n"
    )


def body(parsed):
    return [line.strip() for line in str(parsed).split("\n")[3:-2]]


def loop(*lines):
    return ["scf.for %i = %c0 to %K step %c1  : i32 {", *(f"  {line}" for line in lines), "} loc(#loc)"]


DOT = (
    "%d = tt.dot %x, %y, %z, inputPrecision = tf32 : "
    "tensor<16x16x{0}> * tensor<16x16x{0}> -> tensor<16x16x{1}> loc(#loc)"
)
FP16 = DOT.format("f16", "f32")


def test_text_comes_back_as_it_was():
    lines = [
        '%0:2 = "tt.reduce"(%a, %b) <{axis = 1 : i32}> ({',
        "^bb0(%c: f32 loc(#loc), %d: i32 loc(#loc)):",
        "  tt.reduce.return %c, %d : f32, i32 loc(#loc)",
        "}) : (tensor<4x4xf32>, tensor<4x4xi32>) -> (tensor<4xf32>, tensor<4xi32>) loc(#loc)",
        "%1 = scf.if %p -> (i32) {",
        "  scf.yield %0#1 : i32 loc(#loc)",
        "} else {",
        "  scf.yield %c : i32 loc(#loc)",
        "} loc(#loc)",
        '%2 = tt.elementwise_inline_asm "{ .reg .b32 a; \\22}}}" {constraints = "=r", pure = true} : i32 loc(#loc)',
    ]
    parsed = module(*lines)
    assert body(parsed) == [line.strip() for line in lines]
    reduce, _, branch, *_ = parsed.operation.regions[0][0].inside()
    assert reduce.results == ("%0",)
    assert reduce.operands == ("%a", "%b")
    assert len(branch.regions) == 2


@pytest.mark.parametrize(
    "line",
    ["not an operation", "%a = ", "scf.if %p {", "} loc(#loc)", "%a = arith.addi %b, %c : i32 }", "^bb0: {"],
)
def test_text_of_another_shape_is_refused(line):
    with pytest.raises(UnexpectedIRError):
        module(line)


@given(st.text(alphabet='%abc.=:{}()<>"\\^ \n,1', max_size=40))
def test_the_parser_returns_the_text_or_refuses_it(text):
    try:
        parsed = module(*text.split("\n"))
    except UnexpectedIRError:
        return
    assert body(parsed) == [line.strip() for line in text.split("\n")]


@pytest.mark.parametrize(("a", "d"), [("f16", "f32"), ("f16", "f16"), ("i8", "i32")])
def test_dots_that_turing_has_stay(a, d):
    parsed = module(DOT.format(a, d))
    assert dots.prepare(parsed, 2)
    assert body(parsed) == [DOT.format(a, d)]


@pytest.mark.parametrize(
    ("narrow", "conversion", "wide"),
    [("bf16", "arith.extf {} : {} to {}", "f32"), ("f8E5M2", "tt.fp_to_fp {} : {} -> {}", "f16")],
)
def test_narrow_operands_are_widened(narrow, conversion, wide):
    parsed = module(FP16.replace("%d", "%other"), DOT.format(narrow, "f32"))
    assert dots.prepare(parsed, 2)
    types = [f"tensor<16x16x{t}>" for t in (narrow, wide)]
    assert body(parsed)[1:] == [
        f"%turing_a_d = {conversion.format('%x', *types)} loc(#loc)",
        f"%turing_b_d = {conversion.format('%y', *types)} loc(#loc)",
        f"%d = tt.dot %turing_a_d, %turing_b_d, %z : {types[1]} * {types[1]} -> tensor<16x16xf32> loc(#loc)",
    ]


def test_fp32_dots_lose_their_tf32():
    parsed = module(FP16.replace("%d", "%other"), DOT.format("f32", "f32"))
    assert dots.prepare(parsed, 2)
    assert body(parsed)[1] == DOT.format("f32", "f32").replace(", inputPrecision = tf32", "")


@pytest.mark.parametrize("a", ["bf16", "f32", "f64"])
def test_no_dot_for_tensor_cores(a):
    assert not dots.prepare(module(DOT.format(a, "f64" if a == "f64" else "f32")), 2)


@pytest.mark.parametrize(("a", "d"), [("f64", "f64"), ("bf16", "bf16"), ("f8E4M3FN", "f32"), ("i8", "f32")])
def test_unknown_dots_beside_fp16_are_refused(a, d):
    with pytest.raises(UnexpectedIRError):
        dots.prepare(module(FP16.replace("%d", "%other"), DOT.format(a, d)), 2)


@pytest.mark.parametrize(
    ("line", "safe"),
    [
        ("%v = tt.load %p : tensor<4x!tt.ptr<f16>> loc(#loc)", True),
        ("%v = tt.load %p {isVolatile = true} : tensor<4x!tt.ptr<f16>> loc(#loc)", False),
        ("%v = tt.load %p cacheModifier = cv : tensor<4x!tt.ptr<f16>> loc(#loc)", False),
        ("tt.store %p, %v : tensor<4x!tt.ptr<f16>> loc(#loc)", False),
        ("%v = tt.atomic_rmw fadd, acq_rel, gpu, %p, %x, %m : (i32) -> i32 loc(#loc)", False),
        ("%v = tt.atomic_cas acq_rel, gpu, %p, %x, %m : (i32) -> i32 loc(#loc)", False),
        ("tt.call @g(%p) : (!tt.ptr<f16>) -> () loc(#loc)", False),
        ('%v = tt.elementwise_inline_asm "x" {constraints = "=r", pure = true} : i32 loc(#loc)', True),
        ('%v = tt.elementwise_inline_asm "x" {constraints = "=r", pure = false} : i32 loc(#loc)', False),
        ("%v = tt.an_operation_of_tomorrow %p : i32 loc(#loc)", False),
    ],
)
def test_loops_that_may_write(line, safe):
    parsed = module(FP16, *loop("scf.if %p {", f"  {line}", "} loc(#loc)"))
    assert dots.prepare(parsed, 2)
    assert ("tt.num_stages = 1" in str(parsed)) == (not safe)


def test_a_number_of_stages_is_lowered_never_raised():
    asked = [*loop(FP16)[:-1], "} {tt.num_stages = 4 : i32, tt.other} loc(#loc)"]
    for most, expected in ((2, 2), (1, 1)):
        parsed = module(*asked)
        assert dots.prepare(parsed, most)
        assert body(parsed)[-1] == f"}} {{tt.other, tt.num_stages = {expected} : i32}} loc(#loc)"


def test_loops_are_not_flattened():
    parsed = module(*loop(FP16)[:-1], "} {tt.flatten} loc(#loc)")
    assert dots.prepare(parsed, 2)
    assert body(parsed)[-1] == "} loc(#loc)"


COPY = f"%t = ttg.async_copy_global_to_local %p, %buffer{{}} : {PTR} -> <64x32xf16, #shared, #smem, mutable> loc(#loc)"
TOKEN_LOOP = "%r = scf.for %i = %c0 to %K step %c1 iter_args(%w = %t0) -> (!ttg.async.token)  : i32 {"
STORE = (
    "ttg.local_store %turing_value_t, %buffer : tensor<64x32xf16, #blocked> -> "
    "!ttg.memdesc<64x32xf16, #shared, #smem, mutable> loc(#loc)"
)
POISON = "%t = ub.poison : !ttg.async.token loc(#loc)"


def pipelined(*lines):
    """A loop that carries the token of a copy from one iteration to the next."""
    return [TOKEN_LOOP, *loop(*lines)[1:]]


def test_a_copy_before_the_loop_it_is_for_stays_where_it_is():
    """Its load may read what a store before it, in the same outer iteration, has written."""
    write = f"tt.store %p, %v : {PTR} loc(#loc)"
    parsed = module(*loop(write, COPY.format("")))
    pipeline.without_async_copies(parsed)
    assert body(parsed)[1:-1] == [write, f"%turing_value_t = tt.load %p : {PTR} loc(#loc)", STORE, POISON]


@pytest.mark.parametrize(
    ("copy_operands", "load_operands", "fill"),
    [
        ("", "", False),
        (" mask %m", ", %m, %turing_value_t_other", True),
        (" mask %m other %o", ", %m, %o", False),
        (" mask %m other %o cacheModifier = cg evictionPolicy = evict_last {contiguity = 8 : i32}",
         ", %m, %o cacheModifier = cg evictionPolicy = evict_last", False),
        (" {cachePolicy = #tt.cache_policy<cache_modifier = cg, eviction_policy = normal>, contiguity = 8 : i32}",
         " {cachePolicy = #tt.cache_policy<cache_modifier = cg, eviction_policy = normal>}", False),
    ],
)  # fmt: skip
def test_a_copy_becomes_a_load_and_a_store(copy_operands, load_operands, fill):
    parsed = module(COPY.format(copy_operands))
    pipeline.without_async_copies(parsed)
    zeros = "%turing_value_t_other = arith.constant dense<0.000000e+00> : tensor<64x32xf16, #blocked> loc(#loc)"
    load = f"%turing_value_t = tt.load %p{load_operands} : {PTR} loc(#loc)"
    assert body(parsed) == [zeros] * fill + [load, STORE, POISON]


def test_a_load_moves_up_with_its_address_and_nothing_else():
    address = f"%p = tt.addptr %base, %i : {PTR}, tensor<64x32xi32, #blocked> loc(#loc)"
    use = (
        "%u = ttg.local_load %buffer token %w : !ttg.memdesc<64x32xf16, #shared, #smem> -> tensor<64x32xf16> loc(#loc)"
    )
    parsed = module(*pipelined("%one = arith.addi %i, %i : i32 loc(#loc)", use, address, COPY.format("")))
    pipeline.without_async_copies(parsed)
    load = f"%turing_value_t = tt.load %p : {PTR} loc(#loc)"
    assert body(parsed)[1:-1] == [
        address,
        load,
        "%one = arith.addi %i, %i : i32 loc(#loc)",
        use.replace(" token %w", ""),
        STORE,
        POISON,
    ]


def test_a_load_whose_address_cannot_move_stays():
    address = f"%p = ttg.convert_layout %q : tensor<64x32x!tt.ptr<f16>, #other> -> {PTR} loc(#loc)"
    parsed = module(*pipelined("%one = arith.addi %i, %i : i32 loc(#loc)", address, COPY.format("")))
    pipeline.without_async_copies(parsed)
    assert [line.split(" = ")[0] for line in body(parsed)[1:-1]] == ["%one", "%p", "%turing_value_t", STORE, "%t"]


@pytest.mark.parametrize(
    "line", ["tt.store %p, %v : tensor<4x!tt.ptr<f16>> loc(#loc)", "ttng.arrive %b : i32 loc(#loc)"]
)
def test_a_pipelined_loop_that_writes_is_refused(line):
    with pytest.raises(UnexpectedIRError, match="in a pipelined loop"):
        pipeline.without_async_copies(module(*pipelined(line, COPY.format(""))))


def test_an_unknown_copy_is_refused():
    with pytest.raises(UnexpectedIRError, match="copy"):
        pipeline.without_async_copies(module(COPY.format(" tomorrow %x")))

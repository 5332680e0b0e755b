"""PTX text -> kernel."""

from __future__ import annotations

import pytest

from tools.ptx.parser import (
    Address,
    Immediate,
    Not,
    Pair,
    PtxSyntaxError,
    Register,
    Sink,
    Special,
    Symbol,
    Variable,
    Vector,
    parse,
)

from .harness import HEADER, module

R = Register


def instructions(body: str):
    return [i for i in parse(module(body, 0))["k"].instructions if "%tid" not in i.text and i.opcode != "ret"]


@pytest.mark.parametrize(
    ("text", "operands"),
    [
        ("add.s32 %r0, %r1, -5;", (R("%r0"), R("%r1"), Immediate(-5))),
        ("mov.b32 %r0, 0xFFu;".replace("u", "U"), (R("%r0"), Immediate(255))),
        ("mov.b32 %r0, 0f3F800000;", (R("%r0"), Immediate(0x3F800000, 32))),
        ("mov.b64 %d0, 0d3FF0000000000000;", (R("%d0"), Immediate(0x3FF0000000000000, 64))),
        ("mov.u32 %r0, %ctaid.x;", (R("%r0"), Special("%ctaid.x"))),
        ("mov.b32 %r0, global_smem;", (R("%r0"), Symbol("global_smem"))),
        ("mov.b64 {_, %r1}, %d0;", (Vector((Sink(), R("%r1"))), R("%d0"))),
        ("ld.shared.b32 %r0, [%r1+-8];", (R("%r0"), Address(R("%r1"), -8))),
        ("ld.shared.b32 %r0, [%r1-8];", (R("%r0"), Address(R("%r1"), -8))),
        ("ld.global.b32 { %r0 }, [ %d0 + 0 ];", (Vector((R("%r0"),)), Address(R("%d0"), 0))),
        ("ld.shared.b32 %r0, [global_smem+16];", (R("%r0"), Address(Symbol("global_smem"), 16))),
        ("ld.shared.b32 %r0, [64];", (R("%r0"), Address(None, 64))),
        ("setp.eq.and.s32 %p0|%p1, %r0, 0, !%p2;", (Pair(R("%p0"), R("%p1")), R("%r0"), Immediate(0), Not(R("%p2")))),
    ],
)
def test_operands(text: str, operands: tuple) -> None:
    (instruction,) = instructions(text)
    assert instruction.operands == operands


def test_instruction_names_guards_and_lines() -> None:
    first, second = instructions("@!%p1 ld.global.L1::evict_last.v2.b32\n {%r0, %r1}, [%d0]; // comment\nbar.sync 0;")
    assert first.name == "ld.global.L1::evict_last.v2.b32"
    assert first.guard == Not(R("%p1"))
    assert first.text == "@!%p1 ld.global.L1::evict_last.v2.b32 {%r0, %r1}, [%d0]"
    assert second.line == first.line + 2


def test_the_rest_of_a_module_is_understood_or_dropped() -> None:
    ptx = """.version 8.8
.target sm_75
.extern .shared .align 16 .b8 global_smem[];
.visible .entry one(.param .u64 .ptr .global .align 1 one_param_0, .param .f32 one_param_1)
.reqntid 64, 2
{
    .reg .b32 %r<9>;
    .shared .align 4 .b8 fixed[12];
$L__top:
    .loc 1 18 0 // kernel.py:18:0
    .pragma "nounroll";
    { .reg .b32 x; mov.b32 x, 1; }
    ret;
$L__end:
}
    .file 1 "kernel.py"
    .section .debug_abbrev { .b8 1 }
.visible .entry two()
{ ret; }
"""
    kernels = parse(ptx)
    one = kernels["one"]
    assert list(kernels) == ["one", "two"]
    assert one.target == "sm_75"
    assert one.num_threads == 128
    assert [(p.name, p.type, p.is_pointer) for p in one.parameters] == [
        ("one_param_0", "u64", True),
        ("one_param_1", "f32", False),
    ]
    assert one.variables == [Variable("global_smem", "shared", 16, None), Variable("fixed", "shared", 4, 12)]
    assert one.labels == {"$L__top": 0, "$L__end": 2}
    assert [i.opcode for i in one.instructions] == ["mov", "ret"]


@pytest.mark.parametrize("body", ["add.s32 %r0, %q1, 2;", ".weird 3;", "mov.b32 %r0, [1+2+3];", "mov.b32 %r0, 1"])
def test_text_that_is_not_understood_is_an_error(body: str) -> None:
    with pytest.raises(PtxSyntaxError):
        parse(HEADER + ".visible .entry k() { .reg .b32 %r<2>; " + body + " }")

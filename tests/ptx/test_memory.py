"""Loads, stores, atomics, and what the sanitiser says about wrong ones."""

from __future__ import annotations

import numpy as np
import pytest

from tools.ptx import (
    KernelError,
    MisalignedError,
    OutOfBoundsError,
    Pointer,
    RaceError,
    UninitialisedError,
    UnknownInstructionError,
    launch,
)

from .harness import execute, module

LANES = np.arange(32, dtype=np.uint32)
PLACE = "mov.b32 %r20, global_smem; shl.b32 %r21, %tid32, 2; add.s32 %r22, %r20, %r21;"


def run(body: str, *arrays: np.ndarray, shared_bytes: int = 0, num_threads: int = 32) -> None:
    names = ("x", "y", "z")[: len(arrays)]
    ptx = module(body, len(arrays), num_threads=num_threads)
    launch(ptx, (1,), dict(zip(names, arrays, strict=True)), shared_bytes=shared_bytes)


def test_vectors_hints_and_predicates() -> None:
    x = np.arange(128, dtype=np.float32)
    y = np.full(128, -1, np.float32)
    run(
        """cvta.to.global.u64 %in0, %in0; membar.gl; fence.acq_rel.gpu;
        mad.lo.s64 %d0, %tid64, 16, %in0; mad.lo.s64 %d1, %tid64, 16, %in1; setp.lt.u32 %p0, %tid32, 30;
        @%p0 ld.global.L1::evict_last.v4.b32 {%r0, %r1, %r2, %r3}, [ %d0 + 0 ];
        @%p0 st.global.v2.b32 [ %d1 + 8 ], { %r0, %r3 };""",
        x,
        y,
    )
    wanted = np.full((32, 4), -1, np.float32)
    wanted[:30, 2:] = x.reshape(32, 4)[:30, [0, 3]]
    assert np.array_equal(y.reshape(32, 4), wanted)


def test_narrow_elements_extend_into_wider_registers() -> None:
    x = np.arange(-16, 16, dtype=np.int8)
    y, z = np.zeros(32, np.int32), np.zeros(32, np.uint32)
    run(
        """add.s64 %d0, %tid64, %in0; mad.lo.s64 %d1, %tid64, 4, %in1; mad.lo.s64 %d2, %tid64, 4, %in2;
        ld.global.s8 %r0, [%d0]; st.global.b32 [%d1], %r0; ld.global.u8 %h0, [%d0]; cvt.u32.u16 %r1, %h0;
        st.global.b32 [%d2], %r1;""",
        x,
        y,
        z,
    )
    assert np.array_equal(y, x)
    assert np.array_equal(z, x.view(np.uint8))


def test_a_pointer_starts_inside_its_array() -> None:
    x = np.arange(64, dtype=np.float32)
    body = """mad.lo.s64 %d0, %tid64, 4, %in0; mad.lo.s64 %d1, %tid64, 4, %in1;
        ld.global.b32 %r0, [%d0]; st.global.b32 [%d1], %r0;"""
    launch(module(body, 2), (1,), [x, Pointer(x, 32)])
    assert np.array_equal(x[32:], np.arange(32))


@pytest.mark.parametrize("kind", ["f32", "f16", "s32"])
def test_atomics_add_in_the_order_of_threads(kind: str) -> None:
    dtype = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[kind]
    family, suffix = ("%h", ".noftz") if kind == "f16" else ("%r", "")
    x = np.array([0, 1], dtype)
    values = (np.random.default_rng(0).standard_normal(32) * 100).astype(dtype)
    width = x.itemsize
    y = np.zeros(32, dtype)
    run(
        f"""mad.lo.s64 %d0, %tid64, {width}, %in1; ld.global.b{8 * width} {family}0, [%d0];
        atom.global.gpu.acq_rel.add{suffix}.{kind} {family}1, [%in0+{width}], {family}0;
        mad.lo.s64 %d1, %tid64, {width}, %in2; st.global.b{8 * width} [%d1], {family}1;
        red.global.add{suffix}.{kind} [%in0], {family}0;""",
        x,
        values,
        y,
    )
    total = dtype(1)
    for value, before in zip(values, y, strict=True):
        assert before == total
        total = dtype(total + value)
    assert x[1] == total


def test_float32_atomics_flush_in_global_memory_only() -> None:
    x, y = np.zeros(2, np.float32), np.zeros(1, np.float32)
    tiny = "0f00000001"  # the smallest subnormal
    run(
        f"""setp.eq.u32 %p0, %tid32, 0; @%p0 red.global.add.f32 [%in0], {tiny};
        mov.b32 %r20, global_smem; st.shared.b32 [%r20], 0; bar.sync 0; @%p0 red.shared.add.f32 [%r20], {tiny};
        bar.sync 0; ld.shared.b32 %r1, [%r20]; st.global.b32 [%in1], %r1;""",
        x,
        y,
        shared_bytes=16,
    )
    assert x[0] == 0
    assert y.view(np.uint32)[0] == 1


def test_atomics_of_other_kinds() -> None:
    x = np.array([5, 40, 0, 7], np.uint32)
    run(
        """red.global.max.u32 [%in0], %tid32; red.global.min.s32 [%in0+4], %tid32; red.global.or.b32 [%in0+8], %tid32;
        atom.global.cas.b32 %r0, [%in0+12], 7, %tid32; atom.global.exch.b32 %r1, [%in0+12], %r0;""",
        x,
    )
    assert x[:3].tolist() == [31, 0, 31]


def test_a_load_past_the_end_names_instruction_thread_and_address() -> None:
    x = np.zeros(31, np.float32)
    with pytest.raises(
        OutOfBoundsError, match=r"byte 124 of 'x', which has 124.*thread 31.*ld\.global\.b32 %r0"
    ) as error:
        run("mad.lo.s64 %d0, %tid64, 4, %in0; ld.global.b32 %r0, [%d0];", x)
    fault = error.value
    assert fault.address is not None
    assert (fault.thread, fault.block, fault.address & 0xFFFF) == (31, (0, 0, 0), 124)
    assert fault.instruction is not None
    assert fault.instruction.opcode == "ld"


def test_a_store_before_the_start_and_a_null_pointer() -> None:
    with pytest.raises(OutOfBoundsError, match="byte -4 of 'x'"):
        run("st.global.b32 [%in0+-4], %r0;", np.zeros(32, np.float32))
    with pytest.raises(OutOfBoundsError, match="address 0x0"):
        launch(module("ld.global.b32 %r0, [%in0];", 1), (1,), [None])


def test_nothing_is_written_back_after_a_fault() -> None:
    x = np.zeros(2, np.int32)
    with pytest.raises(OutOfBoundsError):
        run("mov.b32 %r0, 1; st.global.b32 [%in0], %r0; st.global.b32 [%in0+8], %r0;", x)
    assert x.tolist() == [0, 0]


def test_blocks_whose_order_matters() -> None:
    own = "mov.u32 %r0, %ctaid.x; mad.wide.u32 %d0, %r0, 4, %in0;"
    launch(module(own + "ld.global.b32 %r1, [%d0]; st.global.b32 [%d0], %r0;", 1), (4,), [np.zeros(4, np.int32)])
    launch(module("red.global.add.s32 [%in0], 1;", 1), (4,), [np.zeros(4, np.int32)])
    write_all = own + "st.global.b32 [%in0], %r0;"
    with pytest.raises(RaceError, match="another block wrote") as error:
        launch(module(write_all, 1), (4,), [np.zeros(4, np.int32)])
    assert error.value.block == (1, 0, 0)
    read_first = own + "ld.global.b32 %r1, [%in0+4]; st.global.b32 [%d0], %r0;"
    with pytest.raises(RaceError, match="another block read"):
        launch(module(read_first, 1), (4,), [np.zeros(4, np.int32)])
    x = np.zeros(4, np.int32)
    launch(module(write_all, 1), (4,), [x], independent_blocks=False)
    assert x[0] == 3


def test_arguments_that_overlap() -> None:
    x = np.zeros(64, np.float32)
    with pytest.raises(ValueError, match="overlaps argument 0: give both as a Pointer"):
        launch(module("ret;", 2), (1,), [x, x[32:]])
    with pytest.raises(ValueError, match="not contiguous"):
        launch(module("ret;", 1), (1,), [x[::2]])


def test_misaligned_accesses() -> None:
    with pytest.raises(MisalignedError, match="access of 16 bytes"):
        run("ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%in0+8];", np.zeros(32, np.float32))
    with pytest.raises(MisalignedError):
        run("mov.b32 %r20, global_smem; st.shared.b32 [%r20+2], %r0;", shared_bytes=64)


def test_shared_memory_past_its_end_or_never_written() -> None:
    with pytest.raises(OutOfBoundsError, match="124 bytes of shared"):
        run(PLACE + "st.shared.b32 [%r22], %r0;", shared_bytes=124)
    with pytest.raises(UninitialisedError) as error:
        run(
            PLACE + "setp.ne.u32 %p0, %tid32, 7; @%p0 st.shared.b32 [%r22], %r0; ld.shared.b32 %r1, [%r22];",
            shared_bytes=128,
        )
    assert error.value.thread == 7


def test_shared_memory_starts_unwritten_in_every_block() -> None:
    body = PLACE + "setp.eq.u32 %p0, %r30, 0; @%p0 st.shared.b32 [%r22], %r0; ld.shared.b32 %r1, [%r22];"
    ptx = module("mov.u32 %r30, %ctaid.x;" + body, 0)
    with pytest.raises(UninitialisedError) as error:
        launch(ptx, (2,), [], shared_bytes=128)
    assert error.value.block == (1, 0, 0)


NEIGHBOUR = "xor.b32 %r23, %r22, {distance}; ld.shared.b32 %r1, [%r23];"


@pytest.mark.parametrize("distance", [4, 128])  # the neighbour in the warp, and in the other warp
def test_a_missing_barrier_is_a_race(distance: int) -> None:
    # A first round fills both halves, so that what races is not also unwritten.
    fill = PLACE + "st.shared.b32 [%r22], %tid32; bar.sync 0; st.shared.b32 [%r22], %r0;"
    read = NEIGHBOUR.format(distance=distance)
    run(fill + "bar.sync 0;" + read, shared_bytes=256, num_threads=64)
    with pytest.raises(RaceError, match=r"reads and thread \d+ writes.*ld\.shared"):
        run(fill + read, shared_bytes=256, num_threads=64)


@pytest.mark.parametrize("distance", [4, 128])
def test_a_read_races_with_a_later_write_too(distance: int) -> None:
    body = PLACE + "st.shared.b32 [%r22], %r0; bar.sync 0;" + NEIGHBOUR.format(distance=distance)
    run(body + "bar.sync 0; st.shared.b32 [%r22], %r0;", shared_bytes=256, num_threads=64)
    with pytest.raises(RaceError):
        run(body + "st.shared.b32 [%r22], %r0;", shared_bytes=256, num_threads=64)


def test_a_warp_barrier_orders_its_warp_only() -> None:
    fill = PLACE + "st.shared.b32 [%r22], %tid32; bar.sync 0; st.shared.b32 [%r22], %r0; bar.warp.sync -1;"
    run(fill + NEIGHBOUR.format(distance=4), shared_bytes=256, num_threads=64)
    with pytest.raises(RaceError):
        run(fill + NEIGHBOUR.format(distance=128), shared_bytes=256, num_threads=64)


def test_two_writes_race_unless_one_instruction_writes_one_value() -> None:
    run("mov.b32 %r20, global_smem; st.shared.b32 [%r20], %r0;", shared_bytes=16)
    with pytest.raises(RaceError, match="different values"):
        run("mov.b32 %r20, global_smem; st.shared.b32 [%r20], %tid32;", shared_bytes=16)
    with pytest.raises(RaceError):
        run(
            """mov.b32 %r20, global_smem; setp.eq.u32 %p0, %tid32, 0; setp.eq.u32 %p1, %tid32, 1;
            @%p0 st.shared.b32 [%r20], %r0; @%p1 st.shared.b32 [%r20], %r0;""",
            shared_bytes=16,
        )


def test_a_writer_races_with_the_others_of_its_instruction() -> None:
    body = "mov.b32 %r20, global_smem; st.shared.b32 [%r20], %r0; setp.eq.u32 %p0, %tid32, {reader};"
    for reader in (0, 31):
        with pytest.raises(RaceError):
            run(body.format(reader=reader) + "@%p0 ld.shared.b32 %r1, [%r20];", shared_bytes=16)


def test_atomics_do_not_race_with_each_other_but_with_reads() -> None:
    start = "mov.b32 %r20, global_smem; st.shared.b32 [%r20], %r0; bar.sync 0; red.shared.add.u32 [%r20], 1;"
    run(start + "bar.sync 0; ld.shared.b32 %r1, [%r20];", shared_bytes=16)
    with pytest.raises(RaceError):
        run(start + "ld.shared.b32 %r1, [%r20];", shared_bytes=16)


def test_local_memory_is_each_threads_own() -> None:
    got = execute(
        """.local .align 4 .b8 depot[8];
        mov.b64 %d0, depot; st.local.b32 [%d0+4], %tid32; ld.local.b32 %r0, [%d0+4];""",
        {},
        {"%r0": "u32"},
    )
    assert np.array_equal(got["%r0"], LANES)
    with pytest.raises(UninitialisedError):
        execute(".local .align 4 .b8 depot[8]; mov.b64 %d0, depot; ld.local.b32 %r0, [%d0];", {}, {"%r0": "u32"})


@pytest.mark.parametrize(
    "text",
    [
        "cp.async.ca.shared.global [%r0], [%d0], 16;",
        "add.s32.wide %r0, %r1, %r2;",
        "ld.b32 %r0, [%d0];",
        "mov.b32 %r0, %clock;",
        "add.s32 %d0, %r1, %r2;",
        "bar.sync 1, 16;",
        "cvt.rn.bf16.f32 %h0, %r0;",
        "add.s32 %r0, %r1;",
    ],
)
def test_what_is_not_defined_is_an_error_before_anything_runs(text: str) -> None:
    with pytest.raises((KernelError, ValueError)) as error:
        run(text)
    assert text.rstrip(";") in str(error.value)
    if not text.startswith("mov"):
        assert isinstance(error.value, UnknownInstructionError)

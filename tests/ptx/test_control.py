"""Branches, loops and barriers, with threads that go different ways."""

from __future__ import annotations

import numpy as np
import pytest

from tools.ptx import BarrierError, ConvergenceError, TrapError, launch

from .harness import execute, module

LANES = np.arange(32)


def test_a_loop_runs_as_often_as_each_thread_asks() -> None:
    text = """mov.b32 %r0, 0; mov.b32 %r1, 0;
        $L_loop: setp.ge.u32 %p0, %r1, %tid32; @%p0 bra $L_end;
        add.s32 %r1, %r1, 1; add.s32 %r0, %r0, %r1; bra.uni $L_loop;
        $L_end: shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;"""  # all are together again
    got = execute(text, {}, {"%r0": "u32", "%r2": "u32"})
    assert got["%r0"].tolist() == [n * (n + 1) // 2 for n in range(32)]
    assert got["%r2"].tolist() == [n * (n + 1) // 2 for n in LANES ^ 1]


def test_nested_branches_meet_again() -> None:
    text = """and.b32 %r1, %tid32, 1; setp.eq.s32 %p0, %r1, 0; and.b32 %r2, %tid32, 2; setp.eq.s32 %p1, %r2, 0;
        @%p0 bra $L_even;
        mov.b32 %r0, 10; @!%p1 bra $L_join; add.s32 %r0, %r0, 1; bra.uni $L_join;
        $L_even: mov.b32 %r0, 20; @%p1 bra $L_join; add.s32 %r0, %r0, 2;
        $L_join: vote.sync.ballot.b32 %r3, %p0, 0xffffffff;"""
    got = execute(text, {}, {"%r0": "u32", "%r3": "u32"})
    wanted = [(20 if n & 2 == 0 else 22) if n % 2 == 0 else (11 if n & 2 == 0 else 10) for n in range(32)]
    assert got["%r0"].tolist() == wanted
    assert set(got["%r3"].tolist()) == {0x55555555}


def test_a_warp_meets_at_a_shuffle_behind_which_the_way_round_lies() -> None:
    """As Triton 3.6 lays out a loop with a branch in it. One thread of each of two warps goes round."""
    text = """mov.b32 %r5, 0; mov.b32 %r6, 0; bra.uni $L_head;
        $L_short: add.s32 %r5, %r5, 1;
        $L_join: shfl.sync.bfly.b32 %r6, %r5, 1, 31, -1; setp.ge.u32 %p1, %r6, 200; @%p1 bra $L_end;
        add.s32 %r7, %r7, 1; setp.lt.u32 %p2, %r7, 2; @%p2 bra $L_head; bra.uni $L_end;
        $L_head: and.b32 %r8, %tid32, 31; setp.ne.u32 %p0, %r8, 5; @%p0 bra $L_short;
        add.s32 %r5, %r5, 100; bra.uni $L_join;
        $L_end: mad.lo.s64 %at, %tid64, 4, %in0; st.global.b32 [%at], %r6;"""
    out = np.zeros(64, np.int32)
    counters = launch(module(f"mov.b32 %r7, 0; {text}", 1, num_threads=64), (1,), [out])
    assert out.tolist() == [200 if n % 32 == 4 else 2 for n in range(64)]
    assert counters.opcodes["shfl.sync.bfly.b32"] == 2 * 2  # two rounds of two warps


def test_what_follows_a_warp_wide_instruction_runs_once() -> None:
    text = """mov.b32 %r0, 0; add.s32 %r0, %r0, 1; shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; add.s32 %r0, %r0, %r1;
        bar.sync 0; shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; add.s32 %r0, %r0, %r1;"""
    assert set(execute(text, {}, {"%r0": "u32"})["%r0"].tolist()) == {4}


def test_a_part_of_a_warp_may_shuffle_while_another_waits_for_all() -> None:
    text = """setp.lt.u32 %p0, %tid32, 16; @%p0 bra $L_all;
        bra.uni $L_half; $L_all: shfl.sync.bfly.b32 %r0, %tid32, 16, 31, -1; bra.uni $L_end;
        $L_half: shfl.sync.bfly.b32 %r1, %tid32, 1, 31, 0xffff0000; bra.uni $L_all; $L_end: mov.b32 %r2, %r1;"""
    got = execute(text, {}, {"%r0": "u32", "%r2": "u32"})
    assert got["%r0"].tolist() == (LANES ^ 16).tolist()
    assert got["%r2"].tolist() == [n ^ 1 if n >= 16 else 0 for n in range(32)]


def test_a_part_of_a_warp_that_waits_for_threads_that_never_come() -> None:
    text = """setp.lt.u32 %p0, %tid32, 31; @%p0 bra $L_all; bra.uni $L_end;
        $L_all: shfl.sync.bfly.b32 %r0, %tid32, 1, 31, -1; $L_end: mov.b32 %r1, 0;"""
    with pytest.raises(ConvergenceError, match=r"is named, but does not execute.*thread 31.*shfl\.sync"):
        execute(text, {}, {"%r0": "u32"})


def test_threads_may_arrive_at_a_barrier_one_after_the_other() -> None:
    body = """mov.b32 %r20, global_smem; shl.b32 %r21, %tid32, 2; add.s32 %r22, %r20, %r21;
        setp.lt.u32 %p0, %tid32, 20; mov.b32 %r1, 1; @%p0 bra $L_go; mov.b32 %r1, 2;
        $L_go: st.shared.b32 [%r22], %r1; bar.sync 0; xor.b32 %r23, %r22, 128; ld.shared.b32 %r2, [%r23];
        mad.lo.s64 %at, %tid64, 4, %in0; st.global.b32 [%at], %r2;"""
    out = np.zeros(64, np.int32)
    counters = launch(module(body, 1, num_threads=64), (1,), [out], shared_bytes=256)
    assert out.tolist() == [1 if n ^ 32 < 20 else 2 for n in range(64)]
    assert counters.barriers == 1


def test_a_barrier_that_a_thread_never_reaches() -> None:
    body = "setp.eq.u32 %p0, %tid32, 40; @%p0 ret; bar.sync 0;"
    with pytest.raises(BarrierError, match=r"1 threads do not reach.*has ended.*thread 40.*bar\.sync 0") as error:
        launch(module(body, 0, num_threads=64), (1,), [])
    assert error.value.thread == 40


def test_threads_that_wait_at_different_barriers() -> None:
    body = "setp.eq.u32 %p0, %tid32, 3; @%p0 bra $L_b; bar.sync 0; bra.uni $L_end; $L_b: bar.sync 0; $L_end: ret;"
    with pytest.raises(BarrierError, match="waits at another barrier"):
        launch(module(body, 0), (1,), [])


def test_a_kernel_that_does_not_end_and_one_that_gives_up() -> None:
    with pytest.raises(TrapError, match="has not ended"):
        launch(module("$L_x: bra.uni $L_x;", 0), (1,), [], step_limit=1000)
    with pytest.raises(TrapError) as error:
        launch(module("setp.eq.u32 %p0, %tid32, 6; @%p0 trap;", 0), (1,), [])
    assert error.value.thread == 6


def test_blocks_know_their_place_in_the_grid() -> None:
    body = """mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ctaid.y; mov.u32 %r2, %ctaid.z; mov.u32 %r3, %nctaid.x;
        mov.u32 %r4, %nctaid.y; mad.lo.s32 %r5, %r2, %r4, %r1; mad.lo.s32 %r5, %r5, %r3, %r0;
        mad.wide.u32 %at, %r5, 4, %in0; st.global.b32 [%at], %r5;"""
    out = np.full(24, -1, np.int32)
    assert launch(module(body, 1), (2, 3, 4), [out]).blocks == 24
    assert out.tolist() == list(range(24))
    out[...] = -1
    launch(module(body, 1), (2, 3, 4), [out], blocks=[(1, 2, 3)])
    assert np.flatnonzero(out >= 0).tolist() == [23]


def test_a_block_has_as_much_shared_memory_as_the_gpu_gives_it() -> None:
    launch(module("", 0), (1,), [], shared_bytes=64 << 10)
    with pytest.raises(ValueError, match="needs 65552 bytes of shared memory; a block on sm_75 has 65536"):
        launch(module("", 0), (1,), [], shared_bytes=(64 << 10) + 16)

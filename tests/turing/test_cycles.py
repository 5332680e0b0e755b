"""The cycle model: control words as a compiler wrote them, and short loops whose cycles are known."""

import dataclasses

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tools.offline import issue
from tools.offline.control import Control, decode
from tools.offline.machine_code import SHARED_BYTES, Instruction, inner_loops
from tools.offline.turing_sm import (
    BARRIER_LATENCY,
    HMMA_LATENCY,
    MEMORY_DISPATCH,
    MUFU_LATENCY,
    RTX_2080_TI,
    SHARED_LATENCY,
    T4,
    timing,
)

HMMA = ("HMMA", ".1688.F32")
FADD = ("FADD", "")


@pytest.mark.parametrize(
    ("upper", "control"),
    [
        # BAR.SYNC 0x0; LEA R24, P5, R177.reuse, ...; IMAD ... that waits for scoreboard 5; STL [R1+0x40], R20, whose
        # register is read when scoreboard 2 is free; MUFU.EX2 R0, R0, whose result is there when 1 is.
        (0x000FEA0000000000, Control(stall=5)),
        (0x040FE200078A08FF, Control(stall=1, reuse=1)),
        (0x020FE40000000F00, Control(stall=2, waits=(5,))),
        (0x0005E80000100800, Control(stall=4, read_scoreboard=2)),
        (0x000E620000000800, Control(stall=1, write_scoreboard=1)),
        (0x000FC400078A08FF, Control(stall=2, yields=True)),
        (0x001FCA0000000000, Control(stall=5, yields=True, waits=(0,))),
    ],
)
def test_control_words(upper, control):
    assert decode(upper) == control


SASS = """
.L_x_1:
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;     /* 0x000000000204783b */
                                                                /* 0x000e280000000200 */
        /*0020*/              @P1 BRA `(.L_x_1) ;               /* 0xfffffff000001947 */
                                                                /* 0x000fea000383ffff */
"""


def test_the_text_has_control_words_where_it_has_the_encoding():
    (loop,) = inner_loops(SASS)
    load, branch = loop.instructions
    assert load.control == Control(stall=4, write_scoreboard=0)
    assert branch.control == Control(stall=5)
    plain = "\n".join(line.partition("/* 0x")[0] for line in SASS.split("\n"))
    (same,) = inner_loops(plain)
    assert [dataclasses.replace(i, control=None) for i in loop.instructions] == list(same.instructions)


def instruction(opcode, **control):
    name, modifiers = opcode
    return Instruction(name, modifiers, "", Control(**{"stall": 1, **control}))


def cycles(*instructions, num_warps=4, blocks=1, card=T4):
    return issue.simulate(instructions, num_warps, blocks, card).cycles


@pytest.mark.parametrize("num_warps", [1, 4])
def test_an_independent_unit_is_busy_all_the_time(num_warps):
    """A warp, or one a sub-core: a HMMA takes 8 cycles, on GeForce 16, an addition 2."""
    assert cycles(*[instruction(HMMA)] * 10, num_warps=num_warps) == 80
    assert cycles(*[instruction(HMMA)] * 10, num_warps=num_warps, card=RTX_2080_TI) == 160
    assert cycles(*[instruction(FADD)] * 10, num_warps=num_warps) == 20
    assert cycles(*[instruction(("IMMA", ".8816.S8.S8"))] * 10, num_warps=num_warps) == 40


def test_two_warps_of_a_sub_core_share_its_units():
    assert cycles(*[instruction(FADD)] * 10, num_warps=8) == 40
    assert cycles(*[instruction(FADD)] * 10, num_warps=4, blocks=2) == 40
    run = issue.simulate([instruction(FADD)] * 10, 8, 1, T4)
    assert run.busy["fp32"] == 1
    assert run.issued == 0.5
    assert run.waits["fp32"] == 0.5


def test_two_units_work_at_once():
    """A HMMA and four additions take as long as the HMMA."""
    mixed = [instruction(HMMA), *[instruction(FADD, stall=2)] * 4] * 4
    assert cycles(*mixed) == pytest.approx(4 * 9)  # its own issue, and 4 x 2
    assert cycles(*mixed, num_warps=8) == pytest.approx(2 * 4 * 8, rel=0.02)


def test_stall_counts():
    """The compiler's: 4 cycles between dependent additions, which another warp fills."""
    chain = [instruction(FADD, stall=4)] * 10
    assert cycles(*chain) == 40
    assert cycles(*chain, num_warps=8) == 40
    assert cycles(*chain, num_warps=16) == 80


@pytest.mark.parametrize(
    ("opcode", "latency"),
    [
        (("MUFU", ".EX2"), MUFU_LATENCY),
        (HMMA, T4.hmma + HMMA_LATENCY),
        (("LDS", ""), MEMORY_DISPATCH + SHARED_LATENCY),
        (("LDSM", ".16.M88.4"), MEMORY_DISPATCH + SHARED_LATENCY - 2 + 512 // SHARED_BYTES),
        (("LDG", ".E.128"), MEMORY_DISPATCH + T4.global_latency + 512 // T4.global_bytes),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_scoreboard_is_waited_for(opcode, latency):
    """One warp alone: its result, and an addition that needs it."""
    needed = instruction(FADD, waits=(3,))
    assert cycles(instruction(opcode, write_scoreboard=3), needed, num_warps=1) == latency + 1


def test_shared_memory_is_one_for_the_sm():
    """Four warps of four sub-cores ask for 512 bytes each."""
    loads = [instruction(("LDS", ".128"))] * 10
    assert cycles(*loads, num_warps=1) == 10 * 512 / SHARED_BYTES
    assert cycles(*loads, num_warps=4) == 4 * 10 * 512 / SHARED_BYTES
    assert issue.simulate(loads, 4, 1, T4).busy["shared"] == pytest.approx(1)


def test_a_barrier_waits_for_the_block_and_for_what_it_stored():
    barrier = instruction(("BAR", ".SYNC"), stall=1)
    alone = cycles(barrier, instruction(FADD), num_warps=4)
    assert alone == BARRIER_LATENCY + 2  # and an issue of each
    store = instruction(("STS", ".128"))
    assert cycles(store, barrier, instruction(FADD), num_warps=4) >= alone + 4 * 512 / SHARED_BYTES


def test_longer_chains_slower_memory_and_fewer_blocks_cost_more():
    load = instruction(("LDG", ".E.128"), write_scoreboard=0)
    store = [instruction(("STS", ".128"), waits=(0,)), instruction(("BAR", ".SYNC"))]
    math = [instruction(HMMA, stall=8)] * 16
    loop = [load, *store, *math]
    slower = dataclasses.replace(T4, global_latency=2 * T4.global_latency)
    base = cycles(*loop)
    assert cycles(load, *store, *math, *math) > base
    assert cycles(*loop, card=slower) >= base + T4.global_latency - 1
    assert cycles(*loop, blocks=2) / 2 < base
    hoisted = [load, *math, *store]  # in flight during the math: what the pipeline is for
    assert cycles(*hoisted) <= base - 8 * len(math)
    assert issue.simulate(loop, 4, 1, T4).waits["global"] > issue.simulate(hoisted, 4, 1, T4).waits["global"]


def test_what_a_barrier_is_and_a_load_of_local_memory():
    assert timing(instruction(("BAR", ".SYNC"))).memory == "barrier"
    assert timing(instruction(("LDL", ".LU"))).memory == "local"
    assert timing(instruction(("SHFL", ".BFLY"))).data == 128 // SHARED_BYTES
    assert timing(instruction(("BRA", ""))).unit is None


def test_wrong_loops():
    with pytest.raises(ValueError, match="must have their control words, got Instruction"):
        issue.simulate([Instruction("FADD", "", "")], 4, 1)
    with pytest.raises(ValueError, match="blocks and num_warps must be at least 1, got 0 and 4"):
        issue.simulate([instruction(FADD)], 4, 0)

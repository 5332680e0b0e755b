"""What an instruction costs on an SM of Turing: the unit that executes it, for how long, and when its result is there.

Times are in cycles of the SM. Where the compiler counts the cycles until a result can be read (arithmetic, and the
tensor cores' own accumulators), those stand in the control words; what is here are the rates, and the latencies that
a scoreboard waits for. Sources:

    [T4]    Jia et al., Dissecting the NVidia Turing T4 GPU via Microbenchmarking, arXiv 1903.07486
    [2070]  sjfeng1999/gpu-arch-microbenchmark, measured on an RTX 2070
    [sim]   Accel-Sim's configuration of an RTX 2060, fitted to that card (SM75_RTX2060)
    [guide] CUDA C++ Programming Guide, throughput of native arithmetic instructions, 7.5
    [?]     nobody has published it; what is assumed
"""

from __future__ import annotations

import dataclasses

from tools.offline.machine_code import LANES, SHARED_BYTES, Instruction

WAITS = ("tensor", "fp32", "alu", "mufu", "shared", "global", "local", "barrier", "latency", "other")
SUB_CORE_UNITS = ("tensor", "fp32", "alu", "mufu", "memory")


@dataclasses.dataclass(frozen=True)
class Card:
    """What differs between cards.

    hmma: cycles that a sub-core's tensor cores take for a HMMA.1688 that accumulates in fp32
    global_latency: from issue to a register, through L2
    global_bytes: a cycle, from L2 to an SM, when all SMs ask
    """

    name: str
    sms: int
    hertz: float
    hmma: int
    global_latency: int
    global_bytes: int


# 320 GB/s of DRAM, and of L2 1,270 GB/s [T4] for 40 SMs at 1.59 GHz. Tiles of k and v are read by every block of a
# head: they come from L2, 236 cycles away [2070]; [T4] has 188, at the lower clock that its power allows.
T4 = Card("Tesla T4", 40, 1.59e9, 8, 236, 20)
# GeForce: HMMA with fp32 accumulators at half rate (NVIDIA Turing whitepaper, table of the GeForce RTX 2080 Ti). L2's
# bytes a cycle are T4's, by its slices: 5.5 MB for 4 [?].
RTX_2080_TI = Card("GeForce RTX 2080 Ti", 68, 1.545e9, 16, 236, 20)
# The same chip with the professional rate (NVIDIA Turing whitepaper, appendix).
TITAN_RTX = Card("TITAN RTX", 72, 1.77e9, 8, 236, 20)
CARDS = {card.name: card for card in (T4, RTX_2080_TI, TITAN_RTX)}

HMMA_LATENCY = 10  # from a unit's last cycle on an instruction to its result [?]: dependent HMMAs are 16 to 18 apart
SHARED_LATENCY = 19  # [T4]; [2070] 23, both with the first 2 cycles of data
MUFU_LATENCY = 21  # [sim]
BARRIER_LATENCY = 12  # from the last warp's arrival until the first goes on [?]
MEMORY_DISPATCH = 2  # cycles of a sub-core's port for an instruction to memory [?]
MEMORY_QUEUE = 8  # instructions to memory that a sub-core holds before it stops issuing them [?]

_GLOBAL = {"LDG", "STG", "RED", "ATOM", "ATOMG"}
_LOCAL = {"LDL", "STL"}
_SHARED = {"LDS", "LDSM", "STS", "ATOMS", "SHFL"}
_FP32_LIKE = {"HADD2", "HFMA2", "HMUL2", "HSETP2", "HSET2", "FCHK", "FSWZADD"}
_NO_UNIT = {"NOP", "BRA", "BSSY", "BSYNC", "WARPSYNC", "YIELD", "DEPBAR", "EXIT", "CS2R"}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one instruction.

    unit: of a sub-core; None if only its issue counts
    busy: cycles that the unit takes no other
    latency: from issue, or from its turn in memory, to its result
    memory: "shared", "global" or "local" if it goes through the SM's memory pipe; "barrier" for BAR
    data: cycles of that pipe
    """

    unit: str | None
    busy: int
    latency: int
    memory: str | None = None
    data: int = 0


def timing(instruction: Instruction, card: Card = T4) -> Timing:
    opcode, words = instruction.opcode, instruction.words
    moved = words * LANES * 4
    if opcode in ("BAR", "MEMBAR"):
        return Timing("memory", MEMORY_DISPATCH, BARRIER_LATENCY, "barrier")
    if opcode in _SHARED:
        data = moved // SHARED_BYTES
        return Timing("memory", MEMORY_DISPATCH, SHARED_LATENCY - 2 + data, "shared", data)
    if opcode in _LOCAL:  # in L1, 32 cycles away [T4, 2070], through the same 64 bytes a cycle
        data = moved // SHARED_BYTES
        return Timing("memory", MEMORY_DISPATCH, 32 - 2 + data, "local", data)
    if opcode in _GLOBAL:
        data = moved // card.global_bytes
        return Timing("memory", MEMORY_DISPATCH, card.global_latency + data, "global", data)
    found = instruction.cycles
    if found is not None:
        unit, busy = found
        if unit == "tensor":
            if opcode == "HMMA" and ".F32" in instruction.modifiers:
                busy = card.hmma
            return Timing(unit, busy, busy + HMMA_LATENCY)
        return Timing(unit, busy, MUFU_LATENCY if unit == "mufu" else busy + 2)
    if opcode in _FP32_LIKE:
        return Timing("fp32", 2, 6)
    if opcode in _NO_UNIT:
        return Timing(None, 0, 2)
    if opcode in ("S2R", "S2UR", "LDC", "R2UR"):
        return Timing("mufu", 2, 24)  # [?]
    return Timing("alu", 2, 8)  # the uniform data path and what is rare

"""Instructions of a whole warp: shuffles, votes, bar.warp.sync."""

from __future__ import annotations

import numpy as np

from .arrays import Array, Bools, Mask
from .definitions import Context, Execute, defines, split, unsupported
from .faults import ConvergenceError
from .parser import Instruction, Pair, Sink

WARP = 32


def converged_warps(mask: Mask, members: Array | None, num_threads: int) -> Array:
    """The warps that execute a .sync instruction. `members` is each thread's member mask (None: all lanes).

    Every thread that a mask names must be there, and every thread that is there must be named.
    """
    active: Bools = np.ones(num_threads, np.bool_) if mask is None else mask
    named: Bools
    if members is None:
        named = np.ones(num_threads, np.bool_)
    else:
        named = (members >> (np.arange(num_threads, dtype=np.uint32) % WARP) & 1).astype(np.bool_)
        by_warp = members.reshape(-1, WARP)
        if mask is None and (by_warp == 0xFFFFFFFF).all():
            return np.arange(num_threads // WARP)
        # Threads of a warp that take part must agree on who does.
        masks = np.where(active.reshape(-1, WARP), by_warp, 0)
        expected = np.repeat(masks.max(axis=1), WARP)
        named = (expected >> (np.arange(num_threads, dtype=np.uint32) % WARP) & 1).astype(np.bool_)
        disagree = active & (members != expected)
        if disagree.any():
            raise ConvergenceError("member masks differ within a warp", thread=int(np.flatnonzero(disagree)[0]))
    warps = np.repeat(active.reshape(-1, WARP).any(axis=1), WARP)
    wrong = warps & (active != named)
    if wrong.any():
        thread = int(np.flatnonzero(wrong)[0])
        problem = "is not named by the member mask" if active[thread] else "is named, but does not execute this"
        raise ConvergenceError(f"a thread of the warp {problem}", thread=thread)
    return np.flatnonzero(warps[::WARP])


@defines("shfl")
def _shuffle(instruction: Instruction, context: Context) -> Execute:
    (kind,), flags = split(instruction, "sync", "up", "down", "bfly", "idx")
    (mode,) = flags & {"up", "down", "bfly", "idx"} or {""}
    if not mode or "sync" not in flags or kind != "b32":
        raise unsupported(instruction)
    registers = context.registers
    target, *sources = instruction.operands
    value, distance, clamp, members = (registers.source(operand, "b32") for operand in sources)
    value_target, range_target = (target.first, target.second) if isinstance(target, Pair) else (target, Sink())
    write, write_in_range = registers.target(value_target, kind), registers.target(range_target, "pred")
    threads = registers.threads
    lane = threads % WARP

    def run(mask: Mask) -> None:
        converged_warps(mask, members, registers.num_threads)
        step, bound = (distance & 31).astype(np.int64), (clamp & 31).astype(np.int64)
        segment = (clamp >> 8 & 31).astype(np.int64)
        last = (lane & segment) | (bound & ~segment)
        other = {
            "up": lane - step,
            "down": lane + step,
            "bfly": lane ^ step,
            "idx": (lane & segment) | (step & ~segment),
        }[mode]
        in_range = other >= last if mode == "up" else other <= last
        source = threads - lane + np.where(in_range, other, lane)
        if mask is not None and (absent := mask & ~mask[source]).any():
            raise ConvergenceError("shuffle from a thread that does not take part", thread=int(absent.argmax()))
        write(value[source], mask)
        write_in_range(in_range, mask)

    return run


@defines("vote")
def _vote(instruction: Instruction, context: Context) -> Execute:
    _, flags = split(instruction, "sync", "all", "any", "uni", "ballot")
    (mode,) = flags & {"all", "any", "uni", "ballot"} or {""}
    if not mode or "sync" not in flags:
        raise unsupported(instruction)
    registers = context.registers
    predicate = registers.predicate(instruction.operands[1])
    members = registers.source(instruction.operands[2], "b32")
    write = registers.target(instruction.operands[0], "b32" if mode == "ballot" else "pred")

    def run(mask: Mask) -> None:
        converged_warps(mask, members, registers.num_threads)
        active = np.ones(registers.num_threads, np.bool_) if mask is None else mask
        yes = (predicate() & active).reshape(-1, WARP)
        no = (~predicate() & active).reshape(-1, WARP)
        result: Array = {
            "all": ~no.any(axis=1),
            "any": yes.any(axis=1),
            "uni": ~(yes.any(axis=1) & no.any(axis=1)),
            "ballot": (yes.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(axis=1).astype(np.uint32),
        }[mode]
        write(np.repeat(result, WARP), mask)

    return run


def warp_barrier(instruction: Instruction, context: Context) -> Execute:
    """bar.warp.sync: the one warp-wide instruction that also orders memory."""
    members = context.registers.source(instruction.operands[0], "b32")

    def run(mask: Mask) -> None:
        for warp in converged_warps(mask, members, context.registers.num_threads):
            context.memory.shared.races.warp_barrier(int(warp))

    return run

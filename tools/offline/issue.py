"""An SM of Turing executes a loop, cycle by cycle: when each warp's next instruction issues, and what it waits for.

Each of the four schedulers issues at most one instruction a cycle, of a warp

    whose last instruction's stall count has passed,
    whose scoreboards that the instruction waits for are free,
    and whose unit is not busy; for memory, whose sub-core's queue is not full.

It stays with the warp that it issued from last, unless the control word says that another may be preferred, and else
takes the youngest that can issue: greedy then youngest, as measured on the generation after Turing (Huerta et al.,
Analyzing Modern NVIDIA GPU Cores, arXiv 2503.20481).

Stall counts and scoreboards are the machine code's own (control.py); how long units and memories take is turing_sm.py.
A scoreboard counts: it is free when all that it was given for is done. Instructions to memory go through one pipe of
the SM, in the order of their issue: shared memory's cycles are also L1's, and of what comes from L2 there are few
bytes a cycle, in a pipe of its own. A warp arrives at a barrier when what it has asked of shared memory has had its
turn.

Not simulated: bank conflicts of registers and of shared memory, the instruction caches, misses of L2, and branches
inside the loop, which are not taken: what they would skip is executed.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Callable, Mapping, Sequence

from tools.offline.control import SCOREBOARDS, Control
from tools.offline.machine_code import SUB_CORES, Instruction
from tools.offline.turing_sm import MEMORY_QUEUE, SUB_CORE_UNITS, T4, WAITS, Card, Timing, timing

WARM_UP, MEASURED = 2, 4  # iterations
# How far apart the blocks begin, in parts of an iteration: some loops settle into different rhythms, which a card's own
# irregular latencies would mix. The mean of all is taken.
APART = (0.0, 0.25, 0.5, 0.75)


@dataclasses.dataclass(frozen=True)
class Run:
    """cycles: of an iteration of every resident block, together

    issued, waits: shares of the schedulers' cycles in which an instruction issued, and in which none did, by what the
    warp that was longest without waited for.
    """

    cycles: float
    busy: Mapping[str, float]  # the share of its time that a unit of a sub-core, or a memory's pipe, is busy
    issued: float
    waits: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class _Step:
    control: Control
    timing: Timing


class _Warp:
    def __init__(self, number: int, block: int, steps: Sequence[_Step], start: float):
        self.number = number
        self.block = block
        self.steps = steps
        self.at = 0
        self.ready = start
        self.held = [0] * SCOREBOARDS  # how often each scoreboard is held
        self.holder = ["other"] * SCOREBOARDS  # by what it was held last
        self.at_barrier = False
        self.memory_until = 0.0  # when what it asked of shared memory has had its turn
        self.finished = 0  # iterations
        self.last_issue = start
        self.yields = False


class _SM:
    def __init__(self, steps: Sequence[_Step], num_warps: int, blocks: int, apart: float):
        self.warps = [
            _Warp(block * num_warps + number, block, steps, block * apart)
            for block in range(blocks)
            for number in range(num_warps)
        ]
        self.num_warps = num_warps
        self.of_core: list[list[_Warp]] = [self.warps[core::SUB_CORES] for core in range(SUB_CORES)]
        self.free = [dict.fromkeys(SUB_CORE_UNITS, 0.0) for _ in range(SUB_CORES)]
        self.queued = [0] * SUB_CORES
        self.pipes = {"shared": 0.0, "global": 0.0}
        self.arrived = [0] * blocks
        self.events: list[tuple[float, int, int, int]] = []  # time, warp or core, what, scoreboard
        self.now = 0.0
        self.last: list[_Warp | None] = [None] * SUB_CORES  # that issued
        self.spent: dict[str, float] = collections.defaultdict(float)
        self.busy: dict[str, float] = collections.defaultdict(float)

    def run(self, iterations: int) -> None:
        """Until the warps have finished so many iterations, on average: a young one may go far ahead."""
        while sum(warp.finished for warp in self.warps) < iterations * len(self.warps):
            self._settle()
            later, reasons = [], []
            for core in range(SUB_CORES):
                if self.of_core[core]:
                    warp, reason, when = self._choose(core)
                    later.append(when)
                    reasons.append(reason)
                    if warp is not None:
                        self._issue(core, warp)
            ahead = min(later)
            if self.events:
                ahead = min(ahead, max(self.events[0][0], self.now + 1))
            if ahead == float("inf"):  # and nothing is under way
                raise ValueError("the loop's barriers or scoreboards never let a warp go on")
            ahead = max(ahead, self.now + 1)
            for reason in reasons:
                self.spent[reason] += ahead - self.now
            self.now = ahead

    def _settle(self) -> None:
        """What is done by now."""
        while self.events and self.events[0][0] <= self.now:
            _, which, what, scoreboard = heapq.heappop(self.events)
            if what == _RELEASE:
                self.warps[which].held[scoreboard] -= 1
            elif what == _DEQUEUE:
                self.queued[which] -= 1
            else:
                block = which
                self.arrived[block] += 1
                if self.arrived[block] == self.num_warps:
                    self.arrived[block] = 0
                    for warp in self.warps[block * self.num_warps : (block + 1) * self.num_warps]:
                        warp.at_barrier = False
                        warp.ready = max(warp.ready, self.now + scoreboard)

    def _choose(self, core: int) -> tuple[_Warp | None, str, float]:
        """The warp that issues now; or why none can, and until when that is so."""
        last = self.last[core]
        if last is not None and not last.yields and self._obstacle(core, last)[0] is None:
            return last, "issue", self.now + 1
        oldest: _Warp | None = None
        why, until = "other", float("inf")
        for warp in reversed(self.of_core[core]):
            reason, when = self._obstacle(core, warp)
            if reason is None:
                return warp, "issue", self.now + 1
            until = min(until, when)
            if oldest is None or warp.last_issue < oldest.last_issue:
                oldest, why = warp, reason
        return None, why, until

    def _obstacle(self, core: int, warp: _Warp) -> tuple[str | None, float]:
        """Why a warp cannot issue now, and when that is over if it is known; (None, now) if it can."""
        if warp.at_barrier:
            return "barrier", float("inf")
        if warp.ready > self.now:
            return "latency", warp.ready
        step = warp.steps[warp.at]
        for number in step.control.waits:
            if warp.held[number]:
                return warp.holder[number], float("inf")
        unit = step.timing.unit
        if unit is not None:
            free = self.free[core][unit]
            if free > self.now:
                return ("shared" if unit == "memory" else unit), free
            if unit == "memory" and self.queued[core] >= MEMORY_QUEUE:
                return "shared", float("inf")
        return None, self.now

    def _issue(self, core: int, warp: _Warp) -> None:
        step, now = warp.steps[warp.at], self.now
        timing, control = step.timing, step.control
        read, done = now + timing.busy + 2, now + timing.latency
        if timing.unit is not None:
            self.free[core][timing.unit] = now + timing.busy
            self.busy[timing.unit] += timing.busy
        if timing.memory == "barrier":
            warp.at_barrier = True
            arrival = max(now, warp.memory_until)
            heapq.heappush(self.events, (arrival, warp.block, _ARRIVE, timing.latency))
        elif timing.memory is not None:
            pipe = "global" if timing.memory == "global" else "shared"
            begins = max(now + timing.busy, self.pipes[pipe])
            self.pipes[pipe] = begins + timing.data
            self.busy[pipe] += timing.data
            read, done = begins + timing.data, begins + timing.latency
            if pipe == "shared":
                warp.memory_until = begins + timing.data
            self.queued[core] += 1
            heapq.heappush(self.events, (begins, core, _DEQUEUE, 0))
        for scoreboard, time in ((control.write_scoreboard, done), (control.read_scoreboard, read)):
            if scoreboard is not None:
                warp.held[scoreboard] += 1
                warp.holder[scoreboard] = timing.memory or timing.unit or "other"
                heapq.heappush(self.events, (time, warp.number, _RELEASE, scoreboard))
        warp.last_issue, warp.yields = now, control.yields
        self.last[core] = warp
        warp.ready = now + max(control.stall, 1)
        warp.at += 1
        if warp.at == len(warp.steps):
            warp.at = 0
            warp.finished += 1


_RELEASE, _DEQUEUE, _ARRIVE = range(3)


def simulate(instructions: Sequence[Instruction], num_warps: int, blocks: int, card: Card = T4) -> Run:
    """A loop's instructions, with control words, executed by some blocks of an SM again and again.

    Raises:
        ValueError: instructions without control words, no block, or a loop in which warps wait for ever
    """
    if blocks < 1 or num_warps < 1:
        raise ValueError(f"blocks and num_warps must be at least 1, got {blocks} and {num_warps}")
    steps = []
    for instruction in instructions:
        if instruction.control is None:
            raise ValueError(f"instructions must have their control words, got {instruction} (nvdisasm -hex has them)")
        steps.append(_Step(instruction.control, timing(instruction, card)))
    alone = sum(max(step.control.stall, 1) for step in steps)
    starts = APART if blocks > 1 else APART[:1]
    runs = [_run(_SM(steps, num_warps, blocks, apart=int(alone * apart))) for apart in starts]

    def mean(of: Callable[[Run], float]) -> float:
        return sum(map(of, runs)) / len(runs)

    return Run(
        cycles=mean(lambda run: run.cycles),
        busy={unit: mean(lambda run, unit=unit: run.busy[unit]) for unit in runs[0].busy},  # type: ignore[misc]
        issued=mean(lambda run: run.issued),
        waits={reason: mean(lambda run, reason=reason: run.waits[reason]) for reason in WAITS},  # type: ignore[misc]
    )


def _run(sm: _SM) -> Run:
    sm.run(WARM_UP)
    for counter in (sm.spent, sm.busy):
        counter.clear()
    began = sm.now
    sm.run(WARM_UP + MEASURED)
    span = sm.now - began
    total = span * sum(1 for warps in sm.of_core if warps)
    return Run(
        cycles=span * len(sm.warps) * len(sm.warps[0].steps) / sm.spent["issue"],
        busy={
            unit: sm.busy[unit] / (total if unit in SUB_CORE_UNITS else span) for unit in (*SUB_CORE_UNITS, *sm.pipes)
        },
        issued=sm.spent["issue"] / total,
        waits={reason: sm.spent[reason] / total for reason in WAITS},
    )

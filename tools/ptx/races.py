"""Races in shared memory: two threads touch a byte between two barriers, at least one of them writing.

Only `bar.sync` (the block) and `bar.warp.sync` (a warp) order memory here. `shfl.sync`, `ldmatrix` and `mma` make a
warp's threads meet, but PTX promises nothing about memory for meeting; nor does a warp run in step since Volta. So two
threads of one warp race as two of different warps do. Atomics do not race with each other. Two threads that write the
same bytes in the same instruction race only if they write different values: which one stays then cannot be told.

Accesses are logged as they happen and judged together when a barrier ends their interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .faults import RaceError
from .parser import Instruction

READ, WRITE, ATOMIC = "reads", "writes", "updates atomically"
Array = NDArray[Any]


@dataclass
class _Access:
    kind: str
    instruction: Instruction
    threads: Array
    addresses: Array  # of the first byte, one a thread
    size: int

    def bytes(self) -> tuple[Array, Array]:
        """Every byte touched, and the thread that does."""
        where = (self.addresses[:, None] + np.arange(self.size)).ravel()
        return where, np.repeat(self.threads, self.size)

    def of_warp(self, warp: int) -> _Access:
        chosen = self.threads // 32 == warp
        return _Access(self.kind, self.instruction, self.threads[chosen], self.addresses[chosen], self.size)


class RaceDetector:
    def __init__(self, size: int, num_threads: int) -> None:
        self.num_warps = num_threads // 32
        self._touched_by = np.full(size, -1, np.int32)
        self._shared = np.zeros(size, np.bool_)
        self.clear()

    def clear(self) -> None:
        self._log: list[_Access] = []
        self._warp_start = [0] * self.num_warps  # since its last bar.warp.sync, as an index into the log
        self._had_warp_barrier = False

    def record(self, kind: str, instruction: Instruction, threads: Array, addresses: Array, size: int) -> None:
        self._log.append(_Access(kind, instruction, threads, addresses, size))

    def block_barrier(self) -> None:
        """Ends the interval of the whole block."""
        if self._had_warp_barrier:
            for warp in range(self.num_warps):
                self.warp_barrier(warp)
            self._check(self._log, group=32)
        else:
            self._check(self._log, group=1)
        self.clear()

    def warp_barrier(self, warp: int) -> None:
        """Ends the interval of a warp's threads among themselves."""
        self._check([access.of_warp(warp) for access in self._log[self._warp_start[warp] :]], group=1)
        self._warp_start[warp] = len(self._log)
        self._had_warp_barrier = True

    def _check(self, log: list[_Access], group: int) -> None:
        """Raises if two groups of `group` threads (one thread, or a warp) race in these accesses."""
        if all(access.kind == READ for access in log):
            return
        self._touched_by[...], self._shared[...] = -1, False
        for access in log:
            where, thread = access.bytes()
            owner = thread // group
            previous = self._touched_by[where]
            # Of several threads at one byte in this access, one is left in `touched_by`; the others see that.
            self._touched_by[where] = owner
            meet = (self._touched_by[where] != owner) | ((previous >= 0) & (previous != owner))
            self._shared[where[meet]] = True
        if not self._shared.any():
            return
        for access in log:
            if access.kind != WRITE and not (access.kind == ATOMIC and any(other.kind == READ for other in log)):
                continue
            where, thread = access.bytes()
            for index in np.flatnonzero(self._shared[where]):
                self._accuse(log, access, int(where[index]), int(thread[index]), group)

    def _accuse(self, log: list[_Access], access: _Access, byte: int, thread: int, group: int) -> None:
        for other in log:
            if other is access or (access.kind == other.kind == ATOMIC):
                continue  # within one instruction the memory itself compares the values written
            where, threads = other.bytes()
            others = threads[(where == byte) & (threads // group != thread // group)]
            if others.size:
                fault = RaceError(
                    f"thread {thread} {access.kind} and thread {int(others[0])} {other.kind} the same byte of shared "
                    f"memory with no barrier between (the other is line {other.instruction.line}: "
                    f"{other.instruction.text})",
                    thread=thread,
                    address=byte,
                )
                fault.instruction = access.instruction
                raise fault

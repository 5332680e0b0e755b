"""Races in shared memory: two threads touch a byte between two barriers, at least one of them writing.

Only `bar.sync` (the block) and `bar.warp.sync` (a warp) order memory here. `shfl.sync`, `ldmatrix` and `mma` make a
warp's threads meet, but PTX promises nothing about memory for meeting; nor does a warp run in step since Volta. So two
threads of one warp race as two of different warps do. Atomics do not race with each other. Two threads that write the
same bytes in the same instruction race only if they write different values: which one stays then cannot be told.

Accesses are logged as they happen and judged together when a barrier ends their interval.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import Array
from .faults import RaceError
from .parser import Instruction

READ, WRITE, ATOMIC = "reads", "writes", "updates atomically"
NOBODY, SEVERAL = -1, -2  # in place of a group's number


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
        # Which group wrote each byte last in the interval under judgement, or updated it atomically.
        self._owners = {kind: np.full(size, NOBODY, np.int32) for kind in (WRITE, ATOMIC)}
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
        for owners in self._owners.values():
            owners[...] = NOBODY
        # Writes first: whether a read comes before or after the write that it races with makes no difference.
        for access in sorted(log, key=lambda access: (WRITE, ATOMIC, READ).index(access.kind)):
            where, thread = access.bytes()
            owner = thread // group
            for kind, owners in self._owners.items():
                if kind == access.kind == ATOMIC:
                    continue
                earlier = owners[where]
                conflict = (earlier != NOBODY) & (earlier != owner)
                if conflict.any():
                    first = int(conflict.argmax())
                    self._accuse(log, access, int(where[first]), int(thread[first]), kind, group)
            if access.kind in self._owners:
                owners = self._owners[access.kind]
                several = (owners[where] != NOBODY) & (owners[where] != owner)
                owners[where] = owner
                # Of several threads at one byte in this access one stays; the others notice.
                several |= owners[where] != owner
                owners[where[several]] = SEVERAL

    def _accuse(self, log: list[_Access], access: _Access, byte: int, thread: int, kind: str, group: int) -> None:
        """Finds the access of `kind` by another group that `thread` races with, and raises."""
        for other in log:
            where, threads = other.bytes()
            others = threads[(where == byte) & (threads // group != thread // group)]
            if other is not access and other.kind == kind and others.size:
                fault = RaceError(
                    f"thread {thread} {access.kind} and thread {int(others[0])} {kind} the same byte of shared memory "
                    f"with no barrier between (the other is line {other.instruction.line}: {other.instruction.text})",
                    thread=thread,
                    address=byte,
                )
                fault.instruction = access.instruction
                raise fault

"""What can go wrong in a kernel: one exception a kind, each naming instruction, block, thread and address."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .parser import Instruction


class KernelError(Exception):
    """A kernel did what its specification forbids; `instruction`, `block`, `thread` and `address` say where.

    The code that finds a fault knows thread and address; the machine adds the instruction and the block as the
    exception passes through it.
    """

    def __init__(self, problem: str, *, thread: int | None = None, address: int | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.thread = thread
        self.address = address
        self.block: tuple[int, int, int] | None = None
        self.instruction: Instruction | None = None

    def __str__(self) -> str:
        parts = [self.problem]
        if self.address is not None:
            parts.append(f"address {self.address:#x}")
        if self.thread is not None:
            parts.append(f"thread {self.thread} (warp {self.thread // 32}, lane {self.thread % 32})")
        if self.block is not None:
            parts.append(f"block {self.block}")
        if self.instruction is not None:
            parts.append(f"line {self.instruction.line}: {self.instruction.text}")
        return "; ".join(parts)


class UnknownInstructionError(KernelError):
    """The machine has no definition of an instruction, or of one of its modifiers or operands."""


class OutOfBoundsError(KernelError):
    """An access outside every buffer, or across the end of one."""


class MisalignedError(KernelError):
    """An address that is not a multiple of the size of the access."""


class UninitialisedError(KernelError):
    """A read of shared or local memory that nothing has written."""


class RaceError(KernelError):
    """Two threads touched the same byte of shared memory, one of them writing, with no barrier between them."""


class BarrierError(KernelError):
    """A barrier that not all threads of the block reach."""


class ConvergenceError(KernelError):
    """A warp-wide (.sync) instruction executed without all the threads that it names."""


class TrapError(KernelError):
    """The kernel executed `trap`, or ran for longer than the limit of steps that it was given."""

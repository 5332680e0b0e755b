"""Executes a kernel's blocks, every instruction on all threads of a block at once.

Control flow: each thread has a program counter, in units of basic blocks. Of the threads that can run, those at the
lowest address run their basic block; so threads that took the longer way round a branch catch up before the others go
on, and all meet again at the join. While all are together, which Triton's kernels mostly are, no masks are needed.

A basic block ends at a label, a branch, an exit or a `bar.sync`. Threads at a `bar.sync` wait until all threads of the
block wait at that same instruction. (PTX lets threads meet at different `bar.sync` of one number; Triton never relies
on it, and a kernel in which it happens has most likely lost its way: an error here.)

Every warp-wide instruction is a basic block of its own. A part of a warp waits at it while any thread can run, and
executes it with those that came meanwhile: on sm_70 and newer such an instruction makes a thread wait for all threads
that it names, and a compiler may put the way round a branch behind the join. (PTX lets threads meet at different
shuffles or votes with the same qualifiers and mask; as above, an error here.)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from . import access, approximate, arithmetic, bits, comparison, conversion, matrix, warp  # noqa: F401 - they fill the table
from .arrays import Array
from .counters import Counters, class_of
from .definitions import Context, Execute, decode
from .faults import BarrierError, ConvergenceError, KernelError, TrapError, UnknownInstructionError
from .memory import GlobalMemory, LocalMemory, Memory, ParameterMemory, SharedMemory
from .parser import Immediate, Instruction, Kernel, Symbol
from .registers import Registers

ENDS = ("bra", "ret", "exit", "trap")
BARRIERS = ("bar", "barrier")
WARP_WIDE = ("ldmatrix", "mma", "shfl", "vote")


def is_warp_wide(instruction: Instruction) -> bool:
    """Its threads wait for the others of their warp."""
    return instruction.opcode in WARP_WIDE or (instruction.opcode in BARRIERS and "warp" in instruction.modifiers)


def is_block_barrier(instruction: Instruction) -> bool:
    return instruction.opcode in BARRIERS and "warp" not in instruction.modifiers


@dataclass
class BasicBlock:
    body: list[tuple[Instruction, Execute]]
    end: Instruction | None  # None: falls through to the next
    target: int = -1  # of a branch
    warp_wide: bool = False  # its body is one warp-wide instruction, and has no end


def _name(error: KernelError, instruction: Instruction | None) -> KernelError:
    """The same error, with the instruction in which it happened unless it already names one."""
    error.instruction = error.instruction or instruction
    return error


class Machine:
    """One kernel, decoded for a launch; `run` executes one block of the grid."""

    def __init__(
        self,
        kernel: Kernel,
        num_threads: int,
        globals_: GlobalMemory,
        parameters: bytes,
        symbols: dict[str, int],
        shared_bytes: int,
        local_bytes: int,
        counters: Counters,
        step_limit: int,
    ) -> None:
        self.kernel, self.num_threads, self.counters, self.step_limit = kernel, num_threads, counters, step_limit
        self.registers = Registers(kernel, num_threads, symbols)
        self.memory = Memory(
            globals_,
            SharedMemory(shared_bytes, num_threads, counters),
            LocalMemory(local_bytes, num_threads),
            ParameterMemory(parameters),
        )
        self._special_registers()
        self.blocks = self._basic_blocks(Context(self.registers, self.memory, counters))
        self._warp_wide = np.array([block.warp_wide for block in self.blocks], np.bool_)
        self._warps_through = [0] * len(self.blocks)

    def _special_registers(self) -> None:
        specials = self.registers.specials
        for name, axis in itertools.product(("tid", "ntid", "ctaid", "nctaid"), "xyz"):
            first = {"tid": 0, "ctaid": 0, "ntid": 1, "nctaid": 1}[name]
            specials[f"%{name}.{axis}"] = np.full(self.num_threads, first, np.uint32)
        specials["%tid.x"][...] = np.arange(self.num_threads)
        specials["%ntid.x"][...] = self.num_threads
        specials["%laneid"] = np.arange(self.num_threads, dtype=np.uint32) % 32

    def _basic_blocks(self, context: Context) -> list[BasicBlock]:
        instructions = self.kernel.instructions
        starts = {0, *self.kernel.labels.values()}
        for i, instruction in enumerate(instructions):
            if instruction.opcode in ENDS or is_block_barrier(instruction):
                starts.add(i + 1)
            elif is_warp_wide(instruction):
                starts |= {i, i + 1}
        bounds = sorted(start for start in starts if start < len(instructions))
        number = {start: i for i, start in enumerate(bounds)}
        blocks = []
        for start, stop in zip(bounds, [*bounds[1:], len(instructions)], strict=True):
            last = instructions[stop - 1]
            ends = last.opcode in ENDS or is_block_barrier(last)
            body = [(each, self._decode(each, context)) for each in instructions[start : stop - ends]]
            block = BasicBlock(body, last if ends else None, warp_wide=is_warp_wide(last))
            if last.opcode == "bra":
                (label,) = last.operands
                if not isinstance(label, Symbol) or label.name not in self.kernel.labels:
                    raise _name(UnknownInstructionError(f"branch to {label}"), last)
                # A label at the very end, after the last instruction, is an exit.
                block.target = number.get(self.kernel.labels[label.name], len(bounds))
            elif ends and is_block_barrier(last):
                self._check_barrier(last)
            blocks.append(block)
        return blocks

    def _decode(self, instruction: Instruction, context: Context) -> Execute:
        try:
            if instruction.opcode in BARRIERS:
                execute = warp.warp_barrier(instruction, context)
            else:
                execute = decode(instruction, context)
            if instruction.guard is None:
                return execute
            predicate = self.registers.predicate(instruction.guard)
        except KernelError as error:
            _name(error, instruction)
            raise
        except (ValueError, TypeError, KeyError, AssertionError) as error:
            # The definition expected other operands or modifiers than these.
            raise _name(UnknownInstructionError(f"{instruction.name}: {error}"), instruction) from error

        def guarded(mask: Array | None) -> None:
            active = predicate() if mask is None else predicate() & mask
            if active.all():
                execute(None)
            elif active.any():
                execute(active.copy())  # the instruction may write its own guard

        return guarded

    def _check_barrier(self, instruction: Instruction) -> None:
        """Only a barrier of the whole block is defined: `bar.sync n`, with or without the block's number of threads."""
        flags = set(instruction.modifiers)
        counts = [operand.value for operand in instruction.operands[1:] if isinstance(operand, Immediate)]
        whole = len(counts) == len(instruction.operands) - 1 and all(count == self.num_threads for count in counts)
        if not flags <= {"sync", "cta", "aligned"} or "sync" not in flags or not whole or instruction.guard is not None:
            raise _name(UnknownInstructionError(f"{instruction.name} of a part of the block"), instruction)

    def run(self, block: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        for axis, index, count in zip("xyz", block, grid, strict=True):
            self.registers.specials[f"%ctaid.{axis}"][...] = index
            self.registers.specials[f"%nctaid.{axis}"][...] = count
        self.memory.globals.block = self.counters.blocks
        self.registers.clear()
        self.memory.shared.clear()
        self.memory.local.clear()
        try:
            self._run()
            self.memory.shared.races.block_barrier()  # the end of the block ends the last interval
        except KernelError as error:
            error.block = block
            raise
        self.counters.blocks += 1

    def _run(self) -> None:
        done = len(self.blocks)
        counter = np.zeros(self.num_threads, np.int64)
        waiting = np.zeros(self.num_threads, np.bool_)
        for _ in range(self.step_limit):
            ready = ~waiting & (counter < done)
            if not ready.any():
                if not waiting.any():
                    return
                self._release(counter, waiting)
                continue
            current = int(counter[ready].min())
            active = ready & (counter == current)
            if active.all():
                # Nobody can catch up before the next branch.
                while self.blocks[current].end is None and current + 1 < done:
                    self._execute(current, None)
                    current += 1
                counter[...] = current
                self._execute(current, None)
            elif self.blocks[current].warp_wide and self._parts_a_warp(active):
                waiting |= active
                continue
            else:
                self._execute(current, active)
            self._advance(self.blocks[current], current, active, counter, waiting)
        raise TrapError(f"the block has not ended after {self.step_limit} basic blocks")

    def _parts_a_warp(self, active: Array) -> bool:
        by_warp = active.reshape(-1, 32)
        return bool((by_warp.any(axis=1) != by_warp.all(axis=1)).any())

    def _execute(self, current: int, mask: Array | None) -> None:
        for instruction, execute in self.blocks[current].body:
            try:
                execute(mask)
            except KernelError as error:
                _name(error, instruction)
                raise
        warps = self.num_threads // 32 if mask is None else int(mask.reshape(-1, 32).any(axis=1).sum())
        self._warps_through[current] += warps

    def _advance(self, block: BasicBlock, current: int, active: Array, counter: Array, waiting: Array) -> None:
        """Moves the threads that ran the block on to where its end sends them."""
        end = block.end
        if end is None:
            counter[active] = current + 1
        elif is_block_barrier(end):
            waiting[active] = True  # at this block, until all threads of the grid's block are
        else:
            taken = active
            if end.guard is not None:
                taken = active & self.registers.predicate(end.guard)()
            counter[active & ~taken] = current + 1
            if end.opcode == "trap" and taken.any():
                raise _name(TrapError("trap", thread=int(taken.argmax())), end)
            counter[taken] = block.target if end.opcode == "bra" else len(self.blocks)

    def _release(self, counter: Array, waiting: Array) -> None:
        """Lets threads go on that wait at a warp-wide instruction, or at a barrier if these are all threads."""
        if self._meet(counter, waiting):
            return
        place = int(counter[waiting].min())
        instruction = self.blocks[place].end
        missing = ~(waiting & (counter == place))
        if missing.any():
            thread = int(missing.argmax())
            where = "has ended" if not waiting[thread] else "waits at another barrier"
            error = BarrierError(
                f"{int(missing.sum())} threads do not reach this barrier; the first {where}", thread=thread
            )
            raise _name(error, instruction)
        try:
            self.memory.shared.races.block_barrier()
        except KernelError as error:
            _name(error, instruction)
            raise
        self.counters.barriers += 1
        waiting[...] = False
        counter[...] = place + 1

    def _meet(self, counter: Array, waiting: Array) -> bool:
        """Lets each warp go on whose threads wait at a warp-wide instruction with all that it names.

        Returns:
            whether any thread waits at such an instruction

        Raises:
            ConvergenceError: some do, but no warp can go on
        """
        wide = waiting.copy()
        wide[waiting] = self._warp_wide[counter[waiting]]
        warp_of = np.arange(self.num_threads) // 32
        errors = []
        for place, number in sorted(set(zip(counter[wide].tolist(), warp_of[wide].tolist(), strict=True))):
            active = wide & (counter == place) & (warp_of == number)
            try:
                self._execute(place, active)
            except ConvergenceError as error:  # before anything was written
                errors.append(error)
            else:
                waiting &= ~active
                counter[active] = place + 1
        if errors and waiting[wide].all():
            raise errors[0]
        return bool(wide.any())

    def count_instructions(self) -> None:
        """Adds what has run to the counters: a basic block's instructions times the warps that went through it."""
        for block, warps in zip(self.blocks, self._warps_through, strict=True):
            for instruction in [instruction for instruction, _ in block.body] + ([block.end] if block.end else []):
                self.counters.instructions[class_of(instruction)] += warps
                self.counters.opcodes[instruction.name] += warps

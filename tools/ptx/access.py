"""ld, st, atom, red and fences: the instructions between registers and memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arrays import Array, Mask
from .definitions import Context, Execute, defines, split, unsupported
from .memory import GlobalMemory, LocalMemory, ParameterMemory, SharedMemory
from .parser import SIZES, Address, Instruction, Operand, Register, Symbol, Vector
from .registers import DTYPES
from .rounding import canonical, flush

# What says how an access is cached or ordered, and has no effect on values where threads run one instruction at a time.
CACHING = (
    "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "volatile", "weak", "relaxed", "acquire", "release", "acq_rel",
    "cta", "gpu", "sys", "L2::64B", "L2::128B", "L2::256B",
    *(f"L1::{hint}" for hint in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")),
)  # fmt: skip
SPACES = ("global", "shared", "shared::cta", "local", "param")
Space = GlobalMemory | SharedMemory | LocalMemory | ParameterMemory


def space_of(instruction: Instruction, context: Context, flags: set[str]) -> Space:
    memory = context.memory
    spaces: dict[str, Space] = {
        "global": memory.globals,
        "shared": memory.shared,
        "shared::cta": memory.shared,
        "local": memory.local,
        "param": memory.parameters,
    }
    named = flags & {*spaces}
    if len(named) != 1:
        raise unsupported(instruction)  # generic addresses among them
    return spaces[named.pop()]


def addresses_of(operand: Operand, context: Context) -> Callable[[], Array]:
    """A function that gives every thread's address, as int64."""
    assert isinstance(operand, Address)
    registers = context.registers
    if operand.base is None or isinstance(operand.base, Symbol):
        base = registers.symbols[operand.base.name] if operand.base else 0
        constant = np.full(registers.num_threads, base + operand.offset, np.int64)
        return lambda: constant
    assert isinstance(operand.base, Register)
    array = registers.array(operand.base)
    offset = np.int64(operand.offset)
    if array.dtype == np.uint32:
        return lambda: array.astype(np.int64) + offset
    wide = array.view(np.int64)
    return lambda: wide + offset


def threads_of(context: Context, mask: Mask) -> Array:
    return context.registers.threads if mask is None else np.flatnonzero(mask)


@defines("ld")
def _load(instruction: Instruction, context: Context) -> Execute:
    (kind,), flags = split(instruction, *SPACES, *CACHING, "v2", "v4")
    space = space_of(instruction, context, flags)
    registers = context.registers
    target, source = instruction.operands
    parts = target.parts if isinstance(target, Vector) else (target,)
    if len(parts) != (4 if "v4" in flags else 2 if "v2" in flags else 1):
        raise unsupported(instruction)
    writes = [registers.target(part, kind, extend=True) for part in parts]
    addresses = addresses_of(source, context)
    dtype = np.dtype(DTYPES[kind])
    count = len(parts)

    def run(mask: Mask) -> None:
        if mask is None:
            values = space.read(instruction, registers.threads, addresses(), dtype, count)
        else:
            threads = np.flatnonzero(mask)
            values = np.zeros((registers.num_threads, count), dtype)
            values[threads] = space.read(instruction, threads, addresses()[threads], dtype, count)
        for i, write in enumerate(writes):
            write(values[:, i], mask)

    return run


@defines("st")
def _store(instruction: Instruction, context: Context) -> Execute:
    (kind,), flags = split(instruction, *SPACES, *CACHING, "v2", "v4")
    space = space_of(instruction, context, flags)
    if isinstance(space, ParameterMemory):
        raise unsupported(instruction)
    registers = context.registers
    target, source = instruction.operands
    parts = source.parts if isinstance(source, Vector) else (source,)
    if len(parts) != (4 if "v4" in flags else 2 if "v2" in flags else 1):
        raise unsupported(instruction)
    # Stores move bits: a float's NaN keeps its payload, so values travel as unsigned integers.
    bits = f"u{8 * SIZES[kind]}"
    values = [registers.source(part, bits, narrow=True) for part in parts]
    addresses = addresses_of(target, context)

    def run(mask: Mask) -> None:
        stacked = np.stack(values, 1)
        if mask is None:
            space.write(instruction, registers.threads, addresses(), stacked)
        else:
            threads = np.flatnonzero(mask)
            space.write(instruction, threads, addresses()[threads], stacked[threads])

    return run


def _update(operation: str, kind: str, flushes: bool) -> Callable[..., Array]:
    """(old, operand[, second operand]) -> new value of an atomic."""
    if operation == "exch":
        return lambda old, value: value
    if operation == "cas":
        return lambda old, compare, value: np.where(old == compare, value, old)
    if operation == "inc":
        return lambda old, limit: np.where(old >= limit, old.dtype.type(0), old + old.dtype.type(1))
    if operation == "dec":
        return lambda old, limit: np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1))
    simple: dict[str, Callable[..., Array]] = {
        "add": np.add, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }  # fmt: skip
    function = simple[operation]
    if kind[0] != "f":
        return function
    if flushes:
        return lambda old, value: canonical(flush(flush(old) + flush(value)))
    return lambda old, value: canonical(old + value)


@defines("atom", "red")
def _atomic(instruction: Instruction, context: Context) -> Execute:
    """In the order of the threads: a choice, where the hardware has none, that makes two runs agree."""
    operations = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    (kind,), flags = split(instruction, "global", "shared", "shared::cta", *CACHING, *operations, "noftz")
    space = space_of(instruction, context, flags)
    (operation,) = flags & {*operations} or {""}
    if (
        not operation
        or isinstance(space, LocalMemory | ParameterMemory)
        or (kind[0] == "f" and operation not in ("add", "exch"))
    ):
        raise unsupported(instruction)
    registers = context.registers
    returns = instruction.opcode == "atom"
    address, *operands = instruction.operands[1:] if returns else instruction.operands
    addresses = addresses_of(address, context)
    sources = [registers.source(operand, kind).reshape(registers.num_threads, -1) for operand in operands]
    write = registers.target(instruction.operands[0], kind) if returns else None
    update = _update(operation, kind, flushes=kind == "f32" and isinstance(space, GlobalMemory))
    dtype, count = np.dtype(DTYPES[kind]), sources[0].shape[1]

    def run(mask: Mask) -> None:
        where = addresses()
        old = np.zeros((registers.num_threads, count), dtype)
        for thread in threads_of(context, mask):
            cell = space.cell(instruction, int(thread), int(where[thread]), dtype, count)
            old[thread] = cell
            cell[...] = update(old[thread], *(source[thread] for source in sources))
        if write:
            write(old.reshape(-1), mask)

    return run


@defines("membar", "fence")
def _fence(instruction: Instruction, context: Context) -> Execute:
    split(instruction, "cta", "gl", "sys", "gpu", "sc", "acq_rel", "acquire", "release")
    return lambda mask: None  # instructions take effect one after the other, so there is nothing left to order

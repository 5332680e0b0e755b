"""Launches a kernel: PTX text, a grid, and the arguments that a GPU would be given."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import Array
from .counters import Counters
from .machine import Machine
from .memory import Buffer, GlobalMemory
from .parser import SIZES, Kernel, Variable, parse

SHARED_LIMIT = 64 << 10  # bytes a block, on sm_75

_FORMATS = {"u8": "B", "s8": "b", "b8": "B", "u16": "H", "s16": "h", "b16": "H", "u32": "I", "s32": "i", "b32": "I",
            "u64": "Q", "s64": "q", "b64": "Q", "f32": "f", "f64": "d"}  # fmt: skip


@dataclass(frozen=True)
class Pointer:
    """An address inside an array: of its element number `offset`, in memory order. For views, such as q of a packed
    qkv: give every argument of one storage the same array."""

    array: Array
    offset: int = 0


Argument = Array | Pointer | int | float | bool | None


def launch(
    ptx: str | Kernel,
    grid: Sequence[int],
    arguments: Sequence[Argument] | Mapping[str, Argument],
    *,
    shared_bytes: int = 0,
    num_warps: int | None = None,
    kernel: str | None = None,
    blocks: Iterable[tuple[int, int, int]] | None = None,
    independent_blocks: bool = True,
    step_limit: int = 1_000_000,
) -> Counters:
    """Executes a kernel on the CPU, checking every step, and returns what it counted.

    Args:
        ptx: a module's text, or a kernel that `parser.parse` returned.
        grid: number of blocks in x, y, z; missing ones are 1.
        arguments: one a parameter of the kernel, in order: a C-contiguous array or a `Pointer` for an address (updated
            in place when the launch ends), a number, or None for a null pointer. Parameters after the last argument
            are zero: Triton adds two pointers, to scratch memory, that few kernels use. A mapping gives the buffers
            names, which errors and counters then use; it is read in its order.
        shared_bytes: size of the dynamic shared memory (`metadata.shared` of a Triton kernel).
        num_warps: warps a block; by default what the kernel requires (.reqntid).
        kernel: name of the entry, where the module has several.
        blocks: which blocks of the grid to execute, as (x, y, z); by default all, x fastest.
        independent_blocks: raise if a block touches what another one wrote, or writes what another one read, other
            than by atomics. Switch it off for kernels whose blocks wait for each other.
        step_limit: basic blocks after which a block counts as hung.

    Returns:
        Counters, for the blocks executed.

    Raises:
        KernelError: a subclass for each thing that a kernel may not do (faults.py). Arrays then stay as they were.
    """
    if isinstance(ptx, str):
        kernels = parse(ptx)
        if kernel is None and len(kernels) != 1:
            raise ValueError(f"name one of the module's kernels: {', '.join(kernels)}")
        ptx = kernels[kernel] if kernel else next(iter(kernels.values()))
    num_threads = 32 * num_warps if num_warps else ptx.num_threads
    if not num_threads:
        raise ValueError(f"{ptx.name} does not say how many threads it needs: give num_warps")
    if num_threads % 32 or (ptx.num_threads and num_threads != ptx.num_threads):
        raise ValueError(f"{ptx.name} needs {ptx.num_threads} threads a block, not {num_threads}")
    x, y, z = (*grid, 1, 1, 1)[:3]
    extent = (x, y, z)
    counters = Counters()
    memory = GlobalMemory(counters, num_threads, independent_blocks=independent_blocks)
    named = arguments if isinstance(arguments, Mapping) else {f"argument {i}": a for i, a in enumerate(arguments)}
    parameters, symbols = _pack(ptx, named, memory)
    shared_size = _place(ptx.variables, "shared", shared_bytes, symbols)
    if shared_size > SHARED_LIMIT:
        raise ValueError(f"{ptx.name} needs {shared_size} bytes of shared memory; a block on sm_75 has {SHARED_LIMIT}")
    local_size = _place(ptx.variables, "local", 0, symbols)
    with np.errstate(all="ignore"):
        machine = Machine(ptx, num_threads, memory, parameters, symbols, shared_size, local_size, counters, step_limit)
        every = ((i, j, k) for k, j, i in itertools.product(*(range(count) for count in reversed(extent))))
        for block in every if blocks is None else blocks:
            machine.run(block, extent)
    memory.finish()
    machine.count_instructions()
    return counters


def launch_triton(compiled: Any, grid: Sequence[int], arguments: Mapping[str, Argument], **options: Any) -> Counters:
    """`launch` of what `triton.compile` returned, with arguments by the names of the kernel's signature.

    Arguments that are compile-time constants have no parameter and may be left out or given; they are not read.
    """
    signature = {name: kind for name, kind in compiled.src.signature.items() if kind != "constexpr"}
    named = {}
    for name in signature:
        if name not in arguments:
            raise ValueError(f"no argument for {name}; the kernel takes {', '.join(signature)}")
        named[name] = arguments[name]
    metadata = compiled.metadata
    return launch(
        compiled.asm["ptx"], grid, named, shared_bytes=metadata.shared, num_warps=metadata.num_warps, **options
    )


def _pack(kernel: Kernel, arguments: Mapping[str, Argument], memory: GlobalMemory) -> tuple[bytes, dict[str, int]]:
    """The bytes of parameter memory, and each parameter's place in it; arrays become buffers."""
    if len(arguments) > len(kernel.parameters):
        raise ValueError(f"{kernel.name} has {len(kernel.parameters)} parameters, not {len(arguments)}")
    data, symbols = b"", {}
    names = [*arguments, *[None] * (len(kernel.parameters) - len(arguments))]
    for parameter, name in zip(kernel.parameters, names, strict=True):
        value = arguments[name] if name is not None else 0
        if isinstance(value, np.ndarray):
            value = Pointer(value)
        if isinstance(value, Pointer):
            array = value.array
            if not array.flags.c_contiguous:
                raise ValueError(f"{name} is not contiguous: give the array that holds it, as a Pointer")
            if parameter.type not in ("u64", "b64"):
                raise ValueError(f"{name} is an array, parameter {parameter.name} is of type {parameter.type}")
            value = _buffer_of(str(name), array, memory).base + value.offset * array.itemsize
        size = SIZES[parameter.type]
        data += bytes(-len(data) % size)
        symbols[parameter.name] = len(data)
        form = _FORMATS[parameter.type]
        number = value or 0
        if form in "BHIQ":
            number = int(number) & ((1 << 8 * size) - 1)
        data += struct.pack(f"<{form}", number)
    return data, symbols


def _buffer_of(name: str, array: Array, memory: GlobalMemory) -> Buffer:
    """The buffer of an array: one for all arguments that are the same memory."""
    for buffer in memory.buffers:
        if buffer.array.ctypes.data == array.ctypes.data and buffer.size == array.nbytes:
            return buffer
        if np.may_share_memory(buffer.array, array):
            raise ValueError(f"{name} overlaps {buffer.name}: give both as a Pointer into one array")
    return memory.add(name, array)


def _place(variables: Sequence[Variable], space: str, dynamic: int, symbols: dict[str, int]) -> int:
    """Gives the variables of a space their addresses, static ones first; returns the bytes they need."""
    end = 0
    for variable in sorted((v for v in variables if v.space == space), key=lambda v: v.size is None):
        end += -end % variable.align
        symbols[variable.name] = end
        end += dynamic if variable.size is None else variable.size
    return end

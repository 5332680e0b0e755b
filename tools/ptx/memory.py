"""Memory spaces that check every access: global buffers, a block's shared memory, threads' local memory, parameters.

Every space reads and writes elements of one NumPy type, several consecutive ones a thread, at byte addresses given for
the threads that take part. An access must be aligned to its whole size and lie inside one buffer; shared and local
memory must have been written before they are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import Array, DType
from .counters import SECTOR, Counters, Traffic, sectors_of_warps
from .faults import MisalignedError, OutOfBoundsError, RaceError, UninitialisedError
from .parser import Instruction
from .races import ATOMIC, READ, WRITE, RaceDetector

NOBODY, SEVERAL = -1, -2  # in place of a block's number

# Each buffer has an address window of its own, so that no wrong offset of a sane size lands in another buffer.
WINDOW_BITS = 40


def _first(threads: Array, wrong: Array) -> tuple[int, int]:
    index = int(np.flatnonzero(wrong)[0])
    return int(threads[index]), index


def check_alignment(threads: Array, addresses: Array, size: int) -> None:
    wrong = (addresses & (size - 1)) != 0
    if wrong.any():
        thread, index = _first(threads, wrong)
        raise MisalignedError(
            f"access of {size} bytes at an address not a multiple of it", thread=thread, address=int(addresses[index])
        )


def _elements(addresses: Array, dtype: DType, count: int) -> Array:
    """Indices (threads, count) of the elements at byte addresses, in an array of that type."""
    elements: Array = (addresses // dtype.itemsize)[:, None] + np.arange(count)
    return elements


class Buffer:
    """A global buffer: a copy of the caller's array, written back when the launch ends."""

    def __init__(self, name: str, array: Array, base: int) -> None:
        self.name, self.array, self.base, self.size = name, array, base, array.nbytes
        self.data = np.zeros((self.size + SECTOR - 1) // SECTOR * SECTOR, np.uint8)
        self.data[: self.size] = array.reshape(-1).view(np.uint8)
        self.touched_read = np.zeros(self.data.size // SECTOR, np.bool_)
        self.touched_written = np.zeros_like(self.touched_read)
        # Which block of the grid read and wrote each byte.
        self._reader = np.full(self.data.size, NOBODY, np.int32)
        self._writer = np.full(self.data.size, NOBODY, np.int32)

    def check_blocks(self, threads: Array, offsets: Array, size: int, block: int, writes: bool) -> None:
        """Raises where blocks depend on each other's order: one writes what another reads or writes."""
        where = (offsets[:, None] + np.arange(size)).ravel()
        writer, reader = self._writer[where], self._reader[where]
        conflict = (writer != NOBODY) & (writer != block)
        if writes:
            conflict |= (reader != NOBODY) & (reader != block)
        if conflict.any():
            first = int(conflict.argmax())
            verb = "writes" if writes else "reads"
            other = "wrote" if writer[first] not in (NOBODY, block) else "read"
            raise RaceError(
                f"this block {verb} byte {int(where[first])} of {self.name!r}, which another block {other}: "
                "the result depends on their order",
                thread=int(threads[first // size]),
                address=self.base + int(where[first]),
            )
        if writes:
            self._writer[where] = block
        else:
            self._reader[where] = np.where((reader == NOBODY) | (reader == block), block, SEVERAL)

    def write_back(self) -> None:
        if self.array.flags.writeable:
            self.array.reshape(-1).view(np.uint8)[...] = self.data[: self.size]


class GlobalMemory:
    """The buffers of a launch. With `independent_blocks`, no block may touch what another has written, or write what
    another has read, but by atomics: then the order of the blocks, which a GPU does not promise, changes nothing."""

    def __init__(self, counters: Counters, num_threads: int, *, independent_blocks: bool = True) -> None:
        self.buffers: list[Buffer] = []
        self.counters = counters
        self.num_threads = num_threads
        self.block = 0  # number of the block that executes, in the order of execution
        self.independent_blocks = independent_blocks

    def add(self, name: str, array: Array) -> Buffer:
        buffer = Buffer(name, array, (len(self.buffers) + 1) << WINDOW_BITS)
        self.buffers.append(buffer)
        self.counters.buffers[name] = Traffic()
        return buffer

    def _locate(self, threads: Array, addresses: Array, size: int) -> list[tuple[Buffer, Array | slice, Array]]:
        """(buffer, which of the threads, their offsets in it), for each buffer that the access touches."""
        check_alignment(threads, addresses, size)
        window = addresses >> WINDOW_BITS
        found = []
        for index in [int(window[0])] if (window == window[0]).all() else np.unique(window).tolist():
            chosen = slice(None) if (window == index).all() else np.flatnonzero(window == index)
            if not 1 <= index <= len(self.buffers):
                thread, first = _first(threads, window == index)
                raise OutOfBoundsError(
                    f"access of {size} bytes outside every buffer{self._nearest(int(addresses[first]))}",
                    thread=thread,
                    address=int(addresses[first]),
                )
            buffer = self.buffers[index - 1]
            offsets = addresses[chosen] - buffer.base
            outside = offsets + size > buffer.size
            if outside.any():
                thread, first = _first(threads[chosen], outside)
                raise OutOfBoundsError(
                    f"access of {size} bytes outside every buffer{self._nearest(int(addresses[chosen][first]))}",
                    thread=thread,
                    address=int(addresses[chosen][first]),
                )
            found.append((buffer, chosen, offsets))
        return found

    def _nearest(self, address: int) -> str:
        """Words for where the address lies, relative to the buffer that it most likely means."""
        near = [buffer for buffer in self.buffers if abs(address - buffer.base) < 1 << (WINDOW_BITS - 1)]
        if not near:
            return ""
        return f" (byte {address - near[0].base} of {near[0].name!r}, which has {near[0].size})"

    def read(self, instruction: Instruction, threads: Array, addresses: Array, dtype: DType, count: int) -> Array:
        size = dtype.itemsize * count
        values = np.empty((threads.size, count), dtype)
        for buffer, chosen, offsets in self._locate(threads, addresses, size):
            values[chosen] = buffer.data.view(dtype)[_elements(offsets, dtype, count)]
            traffic = self.counters.buffers[buffer.name]
            traffic.bytes_read += offsets.size * size
            traffic.sectors_read += self._sectors(threads[chosen], offsets, size)
            buffer.touched_read[offsets // SECTOR] = True
            if self.independent_blocks:
                buffer.check_blocks(threads[chosen], offsets, size, self.block, writes=False)
        return values

    def write(self, instruction: Instruction, threads: Array, addresses: Array, values: Array) -> None:
        count = values.shape[1]
        size = values.dtype.itemsize * count
        for buffer, chosen, offsets in self._locate(threads, addresses, size):
            elements = _elements(offsets, values.dtype, count)
            view = buffer.data.view(values.dtype)
            view[elements] = values[chosen]
            _check_same_value(view, elements, values[chosen], threads[chosen], addresses[chosen])
            traffic = self.counters.buffers[buffer.name]
            traffic.bytes_written += offsets.size * size
            traffic.sectors_written += self._sectors(threads[chosen], offsets, size)
            buffer.touched_written[offsets // SECTOR] = True
            if self.independent_blocks:
                buffer.check_blocks(threads[chosen], offsets, size, self.block, writes=True)

    def cell(self, instruction: Instruction, thread: int, address: int, dtype: DType, count: int) -> Array:
        """The elements of one thread's atomic, as a view to update in place."""
        size = dtype.itemsize * count
        ((buffer, _, offsets),) = self._locate(np.array([thread]), np.array([address]), size)
        traffic = self.counters.buffers[buffer.name]
        traffic.bytes_read += size
        traffic.bytes_written += size
        buffer.touched_read[offsets // SECTOR] = buffer.touched_written[offsets // SECTOR] = True
        start = int(offsets[0]) // dtype.itemsize
        return buffer.data.view(dtype)[start : start + count]

    def _sectors(self, threads: Array, offsets: Array, size: int) -> int:
        if offsets.size == self.num_threads:
            return sectors_of_warps(offsets, np.ones(self.num_threads, np.bool_), size)
        spread, active = np.zeros(self.num_threads, np.int64), np.zeros(self.num_threads, np.bool_)
        spread[threads], active[threads] = offsets, True
        return sectors_of_warps(spread, active, size)

    def finish(self) -> None:
        for buffer in self.buffers:
            traffic = self.counters.buffers[buffer.name]
            traffic.touched_read = int(buffer.touched_read.sum())
            traffic.touched_written = int(buffer.touched_written.sum())
            buffer.write_back()


def _check_same_value(view: Array, elements: Array, values: Array, threads: Array, addresses: Array) -> None:
    """One instruction in which two threads write different values to one place leaves either of them there."""
    lost = (view[elements] != values).any(axis=1)
    if lost.any():
        thread, index = _first(threads, lost)
        raise RaceError(
            "two threads write different values to the same place in one instruction",
            thread=thread,
            address=int(addresses[index]),
        )


class SharedMemory:
    """A block's shared memory. `data` starts as rubbish that no kernel may read."""

    def __init__(self, size: int, num_threads: int, counters: Counters) -> None:
        padded = (size + 15) // 16 * 16
        self.size, self.num_threads, self.counters = size, num_threads, counters
        self.data = np.zeros(padded, np.uint8)
        self._written = np.zeros(padded, np.uint8)  # 255 where written, so that views of wider types can be compared
        self.races = RaceDetector(padded, num_threads)

    def clear(self) -> None:
        self.data[...] = 0xA5
        self._written[...] = 0
        self.races.clear()

    def _check(self, threads: Array, addresses: Array, size: int) -> None:
        check_alignment(threads, addresses, size)
        outside = (addresses < 0) | (addresses + size > self.size)
        if outside.any():
            thread, index = _first(threads, outside)
            raise OutOfBoundsError(
                f"access of {size} bytes outside the block's {self.size} bytes of shared memory",
                thread=thread,
                address=int(addresses[index]),
            )

    def _count(self, store: bool, threads: Array, addresses: Array, size: int) -> None:
        spread, active = np.zeros(self.num_threads, np.int64), np.zeros(self.num_threads, np.bool_)
        spread[threads], active[threads] = addresses, True
        traffic = self.counters.shared_stores if store else self.counters.shared_loads
        self.counters.count_shared(traffic, spread, active, size)

    def _require_written(self, threads: Array, addresses: Array, dtype: DType, elements: Array) -> None:
        bits = np.dtype(f"u{dtype.itemsize}")
        missing = self._written.view(bits)[elements] != np.iinfo(bits).max
        if missing.any():
            thread, index = _first(threads, missing.any(axis=1))
            raise UninitialisedError(
                "read of shared memory that nothing has written", thread=thread, address=int(addresses[index])
            )

    def read(self, instruction: Instruction, threads: Array, addresses: Array, dtype: DType, count: int) -> Array:
        size = dtype.itemsize * count
        self._check(threads, addresses, size)
        elements = _elements(addresses, dtype, count)
        self._require_written(threads, addresses, dtype, elements)
        self._count(False, threads, addresses, size)
        self.races.record(READ, instruction, threads, addresses, size)
        return self.data.view(dtype)[elements]

    def read_rows(self, instruction: Instruction, threads: Array, addresses: Array) -> Array:
        """ldmatrix: rows of eight b16 at these threads' addresses, each read by the four threads that receive it."""
        self._check(threads, addresses, 16)
        dtype = np.dtype(np.uint16)
        elements = _elements(addresses, dtype, 8)
        self._require_written(threads, addresses, dtype, elements)
        # Row r of a matrix goes to lanes 4 r to 4 r + 3, four bytes each.
        readers = (threads // 32 * 32 + threads % 8 * 4)[:, None] + np.arange(4)
        self.races.record(READ, instruction, readers.ravel(), (addresses[:, None] + np.arange(0, 16, 4)).ravel(), 4)
        self._count(False, threads, addresses, 16)
        return self.data.view(dtype)[elements]

    def write(self, instruction: Instruction, threads: Array, addresses: Array, values: Array) -> None:
        count = values.shape[1]
        size = values.dtype.itemsize * count
        self._check(threads, addresses, size)
        elements = _elements(addresses, values.dtype, count)
        view = self.data.view(values.dtype)
        view[elements] = values
        _check_same_value(view, elements, values, threads, addresses)
        bits = np.dtype(f"u{values.dtype.itemsize}")
        self._written.view(bits)[elements] = np.iinfo(bits).max
        self._count(True, threads, addresses, size)
        self.races.record(WRITE, instruction, threads, addresses, size)

    def cell(self, instruction: Instruction, thread: int, address: int, dtype: DType, count: int) -> Array:
        size = dtype.itemsize * count
        threads, addresses = np.array([thread]), np.array([address])
        self._check(threads, addresses, size)
        self._require_written(threads, addresses, dtype, _elements(addresses, dtype, count))
        self.races.record(ATOMIC, instruction, threads, addresses, size)
        start = address // dtype.itemsize
        return self.data.view(dtype)[start : start + count]


class LocalMemory:
    """Memory of which every thread has its own: thread t's byte a is byte t * size + a of one array."""

    def __init__(self, size: int, num_threads: int) -> None:
        self.size = (size + 15) // 16 * 16
        self.data = np.zeros(self.size * num_threads, np.uint8)
        self._written = np.zeros_like(self.data)

    def clear(self) -> None:
        self._written[...] = 0

    def _place(self, threads: Array, addresses: Array, dtype: DType, count: int) -> Array:
        size = dtype.itemsize * count
        check_alignment(threads, addresses, size)
        outside = (addresses < 0) | (addresses + size > self.size)
        if outside.any():
            thread, index = _first(threads, outside)
            raise OutOfBoundsError(
                f"access of {size} bytes outside {self.size} bytes of local memory",
                thread=thread,
                address=int(addresses[index]),
            )
        return _elements(addresses + threads * self.size, dtype, count)

    def read(self, instruction: Instruction, threads: Array, addresses: Array, dtype: DType, count: int) -> Array:
        elements = self._place(threads, addresses, dtype, count)
        bits = np.dtype(f"u{dtype.itemsize}")
        missing = (self._written.view(bits)[elements] != np.iinfo(bits).max).any(axis=1)
        if missing.any():
            thread, index = _first(threads, missing)
            raise UninitialisedError(
                "read of local memory that nothing has written", thread=thread, address=int(addresses[index])
            )
        return self.data.view(dtype)[elements]

    def write(self, instruction: Instruction, threads: Array, addresses: Array, values: Array) -> None:
        elements = self._place(threads, addresses, values.dtype, values.shape[1])
        self.data.view(values.dtype)[elements] = values
        bits = np.dtype(f"u{values.dtype.itemsize}")
        self._written.view(bits)[elements] = np.iinfo(bits).max


class ParameterMemory:
    """The kernel's parameters: read-only, the same for all threads."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, instruction: Instruction, threads: Array, addresses: Array, dtype: DType, count: int) -> Array:
        check_alignment(threads, addresses, dtype.itemsize * count)
        start = int(addresses[0])
        if start < 0 or start + dtype.itemsize * count > len(self.data):
            raise OutOfBoundsError("read beyond the kernel's parameters", thread=int(threads[0]), address=start)
        values = np.frombuffer(self.data, dtype, count, start)
        return np.broadcast_to(values, (threads.size, count))


@dataclass
class Memory:
    globals: GlobalMemory
    shared: SharedMemory
    local: LocalMemory
    parameters: ParameterMemory

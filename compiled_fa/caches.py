"""What outlives a call, all of it: each cache is bounded, and forgets what was not used for longest.

    compiled code                         by what is fixed in it
    calls of functions, checked, routes   by all that is not in their tensors, and by the lengths of sequences
    layouts, block tables                 of calls on KV caches, by lengths, and the last block table
    prepared calls                        what is left of a forward for calls alike
    plans, tables, numbers on devices     tensors that calls of one shape share
    packed tables, of cache lengths       tensors that calls with the same cu_seqlens or cache_seqlens share
    groupings                             which packed sequences run side by side, or as one, and what hides them then
    scratch                               a thread's tiles

What is kept is made outside of inference mode, whoever asks for it first: an inference tensor could not be written to,
nor saved for a backward, by the calls after.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from math import prod
from operator import itemgetter
from typing import Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class _Kept(Protocol):
    name: str

    def clear(self) -> None: ...

    def contents(self) -> str: ...


_all: list[_Kept] = []


def clear_caches() -> None:
    """Forget all that is kept from call to call in this process: compiled code, plans, tables, scratch memory.

    For a process that is done with attention for a while, or short of memory. The next calls make anew what they need;
    compiled code they find in Inductor's cache on disk.
    """
    for cache in _all:
        cache.clear()


def contents() -> str:
    """What the caches hold, and their bounds, in a line."""
    return "; ".join(cache.contents() for cache in _all)


class _Entry(Generic[Value]):
    __slots__ = ("done", "error", "finished", "nbytes", "used", "value")

    def __init__(self) -> None:
        self.done = False
        self.finished = threading.Event()
        self.value: Value | None = None
        self.error: BaseException | None = None
        self.nbytes = self.used = 0


class Cache(Generic[Key, Value]):
    """Values by key, each made when it is first asked for, by the thread that asks: others that need the same one wait
    for it, and those that need another do not.

    entries: how many are kept at most. nbytes: how many bytes they may have, by `size_of` a value.
    """

    def __init__(
        self, name: str, entries: int, nbytes: int | None = None, size_of: Callable[[Value], int] | None = None
    ) -> None:
        self.name = name
        self._most_entries, self._most_bytes, self._size_of = entries, nbytes, size_of
        self._entries: dict[Key, _Entry[Value]] = {}
        self.nbytes = 0  # of all of them
        self._lock = threading.Lock()
        self._clock = itertools.count(1)
        _all.append(self)
        if hasattr(os, "register_at_fork"):  # a child has none of the threads that were making something
            os.register_at_fork(after_in_child=self._start_anew)

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of a key. An error of `make` reaches all who wait for it, and is not kept."""
        entry = self._entries.get(key)
        if entry is None:
            with self._lock:
                entry = self._entries.get(key)
                mine = entry is None
                if entry is None:
                    entry = self._entries[key] = _Entry()
            if mine:
                self._fill(key, entry, make)
        if not entry.done:
            entry.finished.wait()
        if entry.error is not None:
            raise entry.error
        entry.used = next(self._clock)
        return cast(Value, entry.value)

    def _fill(self, key: Key, entry: _Entry[Value], make: Callable[[], Value]) -> None:
        try:
            with torch.inference_mode(False), torch.no_grad():
                entry.value = make()
            entry.nbytes = self._size_of(entry.value) if self._size_of is not None else 0
        except BaseException as error:
            entry.error = error
        with self._lock:
            if self._entries.get(key) is entry:  # and not cleared meanwhile
                if entry.error is not None:
                    del self._entries[key]
                else:
                    self.nbytes += entry.nbytes
            self._evict(spared=entry)
            entry.done = True
        entry.finished.set()

    def _evict(self, spared: _Entry[Value]) -> None:
        """Forget the least recently used ones that are too many, or too much.

        An eighth at a time: to find them takes a look at all, which is not for every call with a new key.
        """
        if not self._is_too_much():
            return
        spare = self._most_entries // 8
        pairs = ((entry.used, key) for key, entry in self._entries.items() if entry.done and entry is not spared)
        old = sorted(pairs, key=itemgetter(0), reverse=True)
        while old and self._is_too_much(spare):
            self.nbytes -= self._entries.pop(old.pop()[1]).nbytes

    def _is_too_much(self, spare: int = 0) -> bool:
        """spare: entries that there is to be room for."""
        too_large = self._most_bytes is not None and self.nbytes > self._most_bytes
        return too_large or len(self._entries) > self._most_entries - spare

    def _start_anew(self) -> None:
        self._lock = threading.Lock()
        self._entries = {key: entry for key, entry in self._entries.items() if entry.done}
        self.nbytes = sum(entry.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.nbytes = 0

    def contents(self) -> str:
        held = f"{self.name} {len(self)} of {self._most_entries}"
        return (
            held if self._most_bytes is None else f"{held}, {_megabytes(self.nbytes)} of {_megabytes(self._most_bytes)}"
        )


class TensorCache(Generic[Value]):
    """Values made of tensors' contents: kept for these very tensors, as long as they live and nobody writes to them.

    A tensor is known by its identity and version, so that to ask costs no look at its contents; it is held weakly.
    entries, nbytes, size_of: as Cache has them. Tensors of inference mode have no version: of them nothing is kept.
    """

    def __init__(self, name: str, entries: int, nbytes: int, size_of: Callable[[Value], int]) -> None:
        self.name = name
        self._most_entries, self._most_bytes, self._size_of = entries, nbytes, size_of
        self._entries: dict[object, tuple[list[weakref.ref[Tensor]], list[int], int, Value]] = {}
        self._lock = threading.RLock()  # a weak reference may die while it is held
        _all.append(self)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._start_anew)

    def get(self, tensors: Sequence[Tensor], key: Hashable, make: Callable[[], Value]) -> Value:
        """key: what else the value depends on."""
        if any(tensor.is_inference() for tensor in tensors):
            return make()
        place = (key, *map(id, tensors))
        versions = [tensor._version for tensor in tensors]
        entry = self._entries.get(place)
        if entry is not None and entry[1] == versions and all(r() is x for r, x in zip(entry[0], tensors, strict=True)):
            with self._lock:  # behind all others: it was used last
                if self._entries.pop(place, None) is not None:
                    self._entries[place] = entry
            return entry[3]
        with torch.inference_mode(False), torch.no_grad():
            value = make()
        references = [weakref.ref(tensor, lambda _: self._forget(place)) for tensor in tensors]
        with self._lock:
            self._entries.pop(place, None)
            self._entries[place] = references, versions, self._size_of(value), value
            while len(self._entries) > self._most_entries or (
                self.nbytes > self._most_bytes and len(self._entries) > 1
            ):
                del self._entries[next(iter(self._entries))]
        return value

    def _forget(self, place: object) -> None:
        with self._lock:
            self._entries.pop(place, None)

    def _start_anew(self) -> None:
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return sum(entry[2] for entry in list(self._entries.values()))

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def contents(self) -> str:
        held, most = _megabytes(self.nbytes), _megabytes(self._most_bytes)
        return f"{self.name} {len(self)} of {self._most_entries}, {held} of {most}"


def stream_of(device: torch.device) -> int | None:
    """The current stream, to be part of the key of tensors that are kept: what was made on another one may not be there
    yet. None: a CUDA graph captures it, which owns what it makes, and makes it again when it is replayed."""
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(device).cuda_stream


class _Buffers(dict[tuple[str, torch.dtype], Tensor]):
    """A thread's, in the order in which they were last used. A class of its own, so that it can be held weakly."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # by identity, for a WeakSet


class Scratch:
    """Named, uninitialised buffers of each thread, which outlive a call: a fresh one of megabytes costs a page fault
    per page, which takes longer than the arithmetic on it.

    limits: bytes of a buffer, a larger one of which is given back after the call; and of all that a thread keeps.
    """

    def __init__(self, name: str, limits: Callable[[], tuple[int, int]]) -> None:
        self.name = name
        self._limits = limits
        self._thread = threading.local()
        self._of_all_threads: weakref.WeakSet[_Buffers] = weakref.WeakSet()
        _all.append(self)

    def _mine(self) -> _Buffers:
        buffers: _Buffers | None = getattr(self._thread, "buffers", None)
        if buffers is None:
            buffers = self._thread.buffers = _Buffers()
            self._of_all_threads.add(buffers)
        return buffers

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous buffer on the CPU. To ask for a name again invalidates what it gave before."""
        size, buffers, key = prod(shape), self._mine(), (name, dtype)
        buffer = buffers.pop(key, None)
        if buffer is None or buffer.numel() < size:
            buffer = None  # given back before there is another
            with torch.inference_mode(False):
                buffer = torch.empty(size, dtype=dtype, device="cpu")
        buffers[key] = buffer  # behind all others
        return buffer[:size].view(shape)

    def trim(self) -> None:
        """To be called when a call is over: gives back what is too large, or too much."""
        buffers, (buffer_bytes, most_bytes) = self._mine(), self._limits()
        kept = 0
        for key in reversed(list(buffers)):
            kept += buffers[key].nbytes
            if buffers[key].nbytes > buffer_bytes or kept > most_bytes:
                kept -= buffers.pop(key).nbytes

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffers in list(self._of_all_threads) for buffer in list(buffers.values()))

    def clear(self) -> None:
        for buffers in list(self._of_all_threads):
            buffers.clear()

    def contents(self) -> str:
        return f"{self.name} {_megabytes(self.nbytes)} of {_megabytes(self._limits()[1])} a thread"


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.4g} MB"

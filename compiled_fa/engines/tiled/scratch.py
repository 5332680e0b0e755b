"""Buffers that outlive a call.

A fresh buffer of megabytes costs a page fault per page in every call; on a CPU that takes longer than the arithmetic on
it. So each thread keeps its tiles. On other devices PyTorch's own allocator does this, and knows streams.
"""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor

KEPT_BYTES = 16 << 20  # larger buffers are given back after the call

_thread = threading.local()


class Scratch:
    """Named, uninitialised, contiguous buffers. Asking for a name again invalidates what it gave before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        if device.type == "cpu":
            self._buffers = _thread.__dict__.setdefault("buffers", {})

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=dtype, device=self.device)
            self._buffers[name, dtype] = buffer
        return buffer[:size].view(shape)

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *exception: object) -> None:
        large = [key for key, buffer in self._buffers.items() if buffer.numel() * buffer.itemsize > KEPT_BYTES]
        for key in large:
            del self._buffers[key]

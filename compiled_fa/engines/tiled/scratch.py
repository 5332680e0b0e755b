"""The buffers of one call. On a CPU they outlive it; on other devices PyTorch's own allocator keeps memory, and knows
streams.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ... import caches
from ...tuning import current


def _limits() -> tuple[int, int]:
    tuned = current().tiled
    return tuned.kept_buffer_bytes, tuned.kept_bytes


_kept = caches.Scratch("scratch", _limits)


class Scratch:
    """Named, uninitialised, contiguous buffers. To ask for a name again invalidates what it gave before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.device.type == "cpu":
            return _kept.take(name, shape, dtype)
        size = prod(shape)
        buffer = self._buffers.pop((name, dtype), None)
        if buffer is None or buffer.numel() < size:
            buffer = None  # given back before there is another
            buffer = torch.empty(size, dtype=dtype, device=self.device)
        self._buffers[name, dtype] = buffer
        return buffer[:size].view(shape)

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cpu":
            _kept.trim()

"""The bytes that a call may take beside its inputs and results: a share of the device's memory, all of it.

What is free is not asked: the same machine cuts the same tiles, and gives the same bits. Only where memory has run out
inside a call is the share halved, once a process, and that call begun again.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TypeVar

import torch

from ....messages import say_once
from ....tuning import on

Result = TypeVar("Result")

UNKNOWN = 4 << 30  # bytes of a device that does not tell

_halved: set[torch.device] = set()


@functools.cache
def memory(device: torch.device) -> int:
    """Bytes of memory that a device has in all."""
    if device.type in ("cuda", "xpu"):
        return int(getattr(torch, device.type).get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return UNKNOWN


def budget(device: torch.device) -> int:
    """Bytes of a call's scratch."""
    share = memory(device) // on(device).tiled.memory_parts
    return share // 2 if device in _halved else share


def within(device: torch.device, call: Callable[[int], Result]) -> Result:
    """call(bytes it may take); once more with half as many, if memory runs out and they were not halved before."""
    try:
        return call(budget(device))
    except RuntimeError as error:
        if device in _halved or not _is_out_of_memory(error):
            raise
    # Out here, because the error holds on to the frames it came through, and they to what was allocated.
    _halved.add(device)
    say_once(f"out of memory on {device}: from here on a call's tiles there take half as much, {budget(device)} bytes")
    return call(budget(device))


def _is_out_of_memory(error: RuntimeError) -> bool:
    """PyTorch has an error of its own for it, but on MPS, where a RuntimeError says so in its message."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)

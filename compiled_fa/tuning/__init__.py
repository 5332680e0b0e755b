"""The numbers that were tuned, all of them, each on the machine that its table names.

form.py   what each number decides, and in what unit
cpu.py    tables of CPUs
gpu.py    tile sizes of the fused engine's kernels

A number that follows from something (a format, a kernel's limits, what a system does) stands where it is used; what was
found by trying stands here. bench/NOTES.md has what was tried.
"""

from __future__ import annotations

from .cpu import ZEN5
from .form import FlexOptions, SdpaCpu, SplitKV, Tiled, Tuning

__all__ = ["FlexOptions", "SdpaCpu", "SplitKV", "Tiled", "Tuning", "current"]

_current = ZEN5


def current() -> Tuning:
    """The table that is in force for engines on a CPU."""
    return _current

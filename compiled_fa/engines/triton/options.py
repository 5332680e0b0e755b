"""Tile sizes, warps and stages of the kernels, from tuning/gpu.py."""

from __future__ import annotations

import torch

from ...tuning import TileOptions
from ...tuning.gpu import OWN
from ..nvidia import TURING, shared_memory
from .program import Terms

INTERPRETED: TileOptions = (16, 16, 4, 1)  # where there is no GPU


def options_for(
    kernel: str, head_dim: int, dtype: torch.dtype, terms: Terms, capability: tuple[int, int]
) -> TileOptions:
    """kernel: "forward", "queries" or "keys". KeyError where no tiles fit: see `largest_head_dim`."""
    if capability == (0, 0):
        return INTERPRETED
    if capability == TURING:
        entry = next(entry for entry in (32, 64, 128, 256) if head_dim <= entry)
        if dtype != torch.float16:
            return OWN.wide[kernel, entry]
        return OWN.fp16[kernel, entry, "plain" if terms == Terms() else "many"]
    entry = next(entry for entry in (64, 128, 256) if head_dim <= entry)
    return OWN.newer[shared_memory(capability), dtype.itemsize, kernel, entry]


def largest_head_dim(dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """For which there are tiles, in both directions."""
    if capability == TURING:
        return max(key[1] for key in (OWN.fp16 if dtype == torch.float16 else OWN.wide) if key[0] == "keys")
    kind = shared_memory(capability), dtype.itemsize
    return max(head_dim for *found, kernel, head_dim in OWN.newer if tuple(found) == kind and kernel == "keys")

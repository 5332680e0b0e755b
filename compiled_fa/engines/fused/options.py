"""Kernel options: tile sizes, warps and pipeline stages of the template, from tuning/gpu.py."""

from __future__ import annotations

import functools

import torch

from ...problem import Direction
from ...tuning import FlexOptions
from ...tuning.gpu import FUSED
from .mods import Features

TURING = (7, 5)
KB = {(7, 5): 64, (8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
LEAST_KB = 99  # of capabilities that KB does not name: 8.6, 8.9, 12.0 and 12.1, and those to come


def options_for(
    direction: Direction,
    head_dim: int,
    dtype: torch.dtype,
    features: Features,
    capability: tuple[int, int],
) -> FlexOptions:
    """By the template's names; empty where there is no GPU. KeyError where no tiles fit: see `largest_head_dim`."""
    if capability == (0, 0):
        return ()
    if capability == TURING:
        entry = next(entry for entry in (32, 64, 128, 256) if head_dim <= entry)
        if dtype != torch.float16:
            return FUSED.wide[direction, entry]
        return FUSED.fp16[direction, entry, _feature_class(features)]
    entry = next(entry for entry in (64, 128, 256, 512) if head_dim <= entry)
    return FUSED.newer[shared_memory(capability), dtype.itemsize, direction, entry]


@functools.cache
def largest_head_dim(dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """For which there are tiles, in both directions."""
    if capability == TURING:
        fp16 = dtype == torch.float16
        found = [key[:2] for key in (FUSED.fp16 if fp16 else FUSED.wide)]
    else:
        kind = shared_memory(capability), dtype.itemsize
        found = [key[2:] for key in FUSED.newer if key[:2] == kind]
    return max(head_dim for direction, head_dim in found if ("backward", head_dim) in found)


def shared_memory(capability: tuple[int, int]) -> int:
    """KB that a block may have."""
    return KB.get(capability, LEAST_KB)


def _feature_class(features: Features) -> str:
    """What of the features costs registers, and cycles of other units than the tensor cores."""
    if features.alibi or features.softcap or features.dropout or features.bias:
        return "many"
    return "dense" if features.layout == "dense" else "packed"


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) for what is no CUDA device."""
    if device.type != "cuda":
        return 0, 0
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache  # a device keeps its own, and to ask takes a tenth of a call
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)

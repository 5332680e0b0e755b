"""Kernel options: tile sizes, warps and pipeline stages of the template, from tuning/gpu.py."""

from __future__ import annotations

import functools

import torch

from ...problem import Direction
from ...tuning import FlexOptions
from ...tuning.gpu import FUSED
from ..nvidia import TURING, shared_memory
from .mods import Features


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


def options_for_pages(
    head_dim: int, dtype: torch.dtype, rows: int, softcap: bool, capability: tuple[int, int]
) -> FlexOptions:
    """Forward on keys in pages, for which BLOCK_N may have to be smaller. rows: of a sequence's queries that share a
    key head, at most. Where there is no GPU, Turing's."""
    capability = TURING if capability == (0, 0) else capability
    if capability == TURING:
        kind = "Turing, fp16" if dtype == torch.float16 else "Turing"
    else:
        kind = f"{8 * dtype.itemsize} bits"
    found = next(options for (of, entry), options in FUSED.few_rows.items() if of == kind and head_dim <= entry)
    if rows <= dict(found)["BLOCK_M"]:
        return found
    return options_for("forward", head_dim, dtype, Features(softcap, layout="packed"), capability)


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


def _feature_class(features: Features) -> str:
    """What of the features costs registers, and cycles of other units than the tensor cores."""
    if features.alibi or features.softcap or features.dropout or features.bias:
        return "many"
    return "dense" if features.layout == "dense" else "packed"

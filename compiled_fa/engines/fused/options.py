"""Kernel options: tile sizes, warps and pipeline stages of the template.

On Turing they come from tuning/gpu.py; Inductor's tables begin with Ampere, and serve from there on.
"""

from __future__ import annotations

import torch

from ...problem import Direction
from ...tuning import FlexOptions
from ...tuning.gpu import TURING
from .mods import Features


def options_for(
    direction: Direction,
    head_dim: int,
    dtype: torch.dtype,
    features: Features,
    capability: tuple[int, int],
) -> FlexOptions:
    """By the template's names; empty: Inductor's own."""
    if capability >= (8, 0) or capability == (0, 0):
        return ()
    if dtype != torch.float16:
        return TURING.wide[direction, _class(head_dim)]
    return TURING.fp16[direction, _class(head_dim), _feature_class(features)]


def _feature_class(features: Features) -> str:
    """What of the features costs registers, and cycles of other units than the tensor cores."""
    if features.alibi or features.softcap or features.dropout:
        return "many"
    return "dense" if features.layout == "dense" else "packed"


def _class(head_dim: int) -> int:
    """The table's head_dim that serves this one: the next one up."""
    return next(entry for entry in (32, 64, 128, 256) if head_dim <= entry)


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) for what is no CUDA device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)

"""Kernel options: tile sizes, warps and pipeline stages of the template.

On Turing they come from the table below; Inductor's tables begin with Ampere, and serve from there on.
"""

from __future__ import annotations

from typing import Literal

import torch

from .mods import Features

Options = tuple[tuple[str, int], ...]


def options_for(
    direction: Literal["forward", "backward"], head_dim: int, features: Features, capability: tuple[int, int]
) -> Options:
    """By the template's names; empty: Inductor's own."""
    if capability >= (8, 0) or capability == (0, 0):
        return ()
    return TURING[direction, _class(head_dim), "many" if _has_many(features) else "few"]


def _has_many(features: Features) -> bool:
    """More than a window in a dense tensor: then scores need registers, and other units than the tensor cores."""
    f = features
    return f.packed or f.alibi or f.softcap is not None or f.threshold is not None


def _class(head_dim: int) -> int:
    """The table's head_dim that serves this one: the next one up."""
    return next(entry for entry in (32, 64, 128, 256) if head_dim <= entry)


def _forward(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Options:
    return (("BLOCK_M", block_m), ("BLOCK_N", block_n), ("num_warps", num_warps), ("num_stages", num_stages))


def _backward(m1: int, n1: int, m2: int, n2: int, num_warps: int, num_stages: int) -> Options:
    blocks = (("BLOCK_M1", m1), ("BLOCK_N1", n1), ("BLOCK_M2", m2), ("BLOCK_N2", n2))
    return (*blocks, ("num_warps", num_warps), ("num_stages", num_stages))


# Found by tools/turing_report.py --search; {}: the kernels' registers, blocks an SM, and the share of the tensor cores'
# peak that the loops' instructions allow (of five products' multiply-adds forward two, backward all that are made).
TURING: dict[tuple[str, int, str], Options] = {
    ("forward", 32, "few"): _forward(128, 64, 4, 2),  # 238, 2, 91 %
    ("forward", 32, "many"): _forward(64, 64, 4, 2),  # 163, 3, 26 %
    ("forward", 64, "few"): _forward(128, 32, 4, 2),  # 236, 2, 100 %
    ("forward", 64, "many"): _forward(64, 64, 4, 2),  # 255, 2, 48 %
    ("forward", 128, "few"): _forward(128, 32, 8, 2),  # 234, 1, 100 %
    ("forward", 128, "many"): _forward(64, 32, 4, 1),  # 255, 2, 74 %
    ("forward", 256, "few"): _forward(64, 32, 8, 1),
    ("forward", 256, "many"): _forward(64, 32, 8, 1),
    ("backward", 32, "few"): _backward(32, 128, 128, 32, 4, 2),  # 253, 2, 100 %
    ("backward", 32, "many"): _backward(32, 64, 64, 32, 4, 2),  # 218, 2, 34 %
    ("backward", 64, "few"): _backward(32, 64, 64, 32, 4, 2),  # 248, 2, 100 %
    ("backward", 64, "many"): _backward(16, 64, 64, 16, 4, 2),  # 168, 2, 61 %
    ("backward", 128, "few"): _backward(32, 32, 32, 32, 4, 1),  # 254, 2, 83 %
    ("backward", 128, "many"): _backward(32, 32, 32, 32, 4, 1),  # 246, 2, 83 %
    ("backward", 256, "few"): _backward(32, 32, 32, 32, 8, 1),
    ("backward", 256, "many"): _backward(32, 32, 32, 32, 8, 1),
}


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) for what is no CUDA device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)

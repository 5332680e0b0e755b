"""Kernel options: tile sizes, warps and pipeline stages of the template.

On Turing they come from the table below; Inductor's tables begin with Ampere, and serve from there on.
"""

from __future__ import annotations

from typing import Literal

import torch

Options = tuple[tuple[str, int], ...]


def options_for(direction: Literal["forward", "backward"], head_dim: int, capability: tuple[int, int]) -> Options:
    """By the template's names; empty: Inductor's own."""
    if capability >= (8, 0) or capability == (0, 0):
        return ()
    return TURING[direction, _class(head_dim)]


def _class(head_dim: int) -> int:
    """The table's head_dim that serves this one: the next one up."""
    return next(entry for entry in (32, 64, 128, 256) if head_dim <= entry)


def _forward(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Options:
    return (("BLOCK_M", block_m), ("BLOCK_N", block_n), ("num_warps", num_warps), ("num_stages", num_stages))


def _backward(m1: int, n1: int, m2: int, n2: int, num_warps: int, num_stages: int) -> Options:
    blocks = (("BLOCK_M1", m1), ("BLOCK_N1", n1), ("BLOCK_M2", m2), ("BLOCK_N2", n2))
    return (*blocks, ("num_warps", num_warps), ("num_stages", num_stages))


TURING: dict[tuple[str, int], Options] = {
    ("forward", 32): _forward(64, 64, 4, 2),
    ("forward", 64): _forward(64, 64, 4, 2),
    ("forward", 128): _forward(128, 32, 8, 2),
    ("forward", 256): _forward(64, 32, 8, 1),
    ("backward", 32): _backward(32, 64, 64, 32, 4, 2),
    ("backward", 64): _backward(32, 64, 64, 32, 4, 2),
    ("backward", 128): _backward(32, 64, 64, 32, 8, 2),
    ("backward", 256): _backward(32, 32, 32, 32, 8, 1),
}


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) for what is no CUDA device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)

"""The tiled engine: FlashAttention as PyTorch ops on tiles, for any device and dtype.

forward.py    Algorithm 1 of FlashAttention-2 (arXiv 2307.08691): online softmax over key tiles
backward.py   Algorithm 2: probabilities recomputed from lse, one key tile after another
steps.py      the arithmetic between the matrix products of a tile
kernels.py    these steps as machine code
chunks.py     which sequences and heads run together, and which of their tiles exist
keys.py       keys and values of a chunk, held or passing by
products.py   matrix products and their dtype
bias.py       where a tile's bias lies, and its gradient
rows.py       reading and writing rows of dense, packed and paged tensors
tiles.py      tile sizes
scratch.py    a call's buffers
large/        the same algorithms in tiles of a GPU's size, of few launches each, where the device's table asks for them
"""

import torch

from ...problem import Direction, Problem
from ..engine import nothing_prepared
from .backward import backward
from .forward import forward
from .tiles import TileSizes

__all__ = ["TileSizes", "backward", "defers", "forward", "inlines", "name", "prepared", "unsupported_reason"]

name = "tiled"

prepared = nothing_prepared


def unsupported_reason(
    device: torch.device, problem: Problem | None = None, direction: Direction = "forward"
) -> str | None:
    """Why this engine cannot serve a device, or a call on it; None: it can. It serves them all."""
    return None


def defers(problem: Problem, direction: Direction, to: str) -> bool:
    """Is another engine faster at a call that this one could serve? There is none after it."""
    return False


def inlines(problem: Problem, direction: Direction) -> bool:
    """Its steps are compiled by themselves, for all shapes at once."""
    return False

"""Pairs of a vector's elements, turned (arXiv 2104.09864): in fp32 (fp64 for fp64), rounded once.

H heads, D head_dim, R elements that are turned.
"""

from __future__ import annotations

import torch
from torch import Tensor


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The first R elements of x (..., H, D), turned; cos and sin: of each token, broadcastable to (..., 1, R / 2)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = cos.detach().to(wide), sin.detach().to(wide)
    x = x[..., : 2 * cos.shape[-1]].to(wide)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, -1)
    pair = first * cos - second * sin, first * sin + second * cos
    return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (..., H, D) with its first R elements turned; cos and sin as in `turned`."""
    found = turned(x, cos, sin, interleaved).to(x.dtype)
    rest = x[..., found.shape[-1] :]
    return torch.cat([found, rest], -1) if rest.shape[-1] else found

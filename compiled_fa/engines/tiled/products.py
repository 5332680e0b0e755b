"""The dtype of a tile's matrix products, and sums of products in a larger one.

Products of bf16 are taken in bf16 where the CPU has instructions for them (tuning/), which makes them three to four
times as fast as in fp32; scores and probabilities are then rounded to bf16, as in naive attention, and sums over tiles
are in fp32. fp16 has no fast products on today's CPUs, and is computed in fp32.

Among few keys probabilities are near 0 or 1, and naive attention loses next to nothing: there a rounding of every
tile's product shows, and products in fp32 take no longer, for reading the queries is what takes time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...tuning import current
from .scratch import Scratch

FEW_KEYS = 16  # fewer than this


def dtype(inputs: Tensor, arithmetic: torch.dtype, longest: tuple[int, int]) -> torch.dtype:
    """Of the products' operands, for inputs of a dtype; longest: rows and columns of the scores of a pair."""
    here = inputs.device.type in ("cpu", "meta")  # meta: to ask what this machine would do
    if inputs.dtype != torch.bfloat16 or not here or longest[1] < FEW_KEYS:
        return arithmetic
    return arithmetic if longest[0] * longest[1] < current().tiled.bf16_from_scores else torch.bfloat16


def add(total: Tensor, a: Tensor, b: Tensor, scratch: Scratch) -> None:
    """total += a b, batch by batch, in total's dtype, which may be larger than that of a and b."""
    if a.dtype == total.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b, out=scratch.take("product", tuple(total.shape), a.dtype))


class Sum:
    """A sum of products: the first is written where the others are added."""

    def __init__(self, total: Tensor, scratch: Scratch) -> None:
        self._total = total
        self._scratch = scratch
        self._empty = True

    def add(self, a: Tensor, b: Tensor) -> None:
        if not self._empty:
            add(self._total, a, b, self._scratch)
        elif a.dtype == self._total.dtype:
            torch.bmm(a, b, out=self._total)
        else:
            product = self._scratch.take("product", tuple(self._total.shape), a.dtype)
            self._total.copy_(torch.bmm(a, b, out=product))
        self._empty = False

    def finished(self) -> Tensor:
        """The sum; zeros where nothing was added."""
        return self._total.zero_() if self._empty else self._total

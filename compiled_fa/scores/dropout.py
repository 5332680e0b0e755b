"""Dropout as a pure function: is probability (batch, head, q_idx, kv_idx) kept under this seed?

A counter-based hash in wrapping 32-bit integer arithmetic, from PyTorch ops alone: it needs no state and no order, so
every engine, tile size and device decides alike, and the backward pass decides again instead of storing a mask.

A row is hashed to 64 bits of state by absorbing batch, head and q_idx one after another; an element then costs two
32-bit mixes. 64 bits, because two of many rows meet in 32: such rows would drop the same keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Row = tuple[Tensor, Tensor]  # 64 bits of hash state for each row

GOLDEN = 0x9E3779B9 - (1 << 32)  # 2**32 / golden ratio, as a signed number; separates the two halves of the state


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers whose every output bit depends on every input bit.

    The constants are those of Chris Wellons' search for low-bias hashes (hash-prospector, "lowbias32"). An arithmetic
    shift with its sign bits masked off is a logical one.
    """
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def threshold(dropout_p: float) -> int:
    """The hash, of signed 32 bits, below which nothing is kept: exact to 2**-32."""
    return min(round(dropout_p * 2.0**32), 2**32 - 1) - 2**31


@dataclass(frozen=True)
class Dropout:
    """Keep decisions under one seed.

    seed: int32 (2,), the two halves of a 64-bit seed.
    threshold: a hash, uniform over signed 32-bit integers, keeps its probability when it is not below this.
    """

    seed: Tensor
    threshold: int | Tensor

    @classmethod
    def of(cls, dropout_p: float, seed: Tensor) -> Dropout:
        """From a probability in [0, 1) and an int64 seed of one element."""
        return cls(seed.reshape(1).view(torch.int32), threshold(dropout_p))

    def row(self, batch: Tensor, head: Tensor, q_idx: Tensor) -> Row:
        """What the decisions of a row have in common, of the broadcast shape of the three indices."""
        low, high = mix(self.seed.select(0, 0)), mix(self.seed.select(0, 1) ^ GOLDEN)
        for index in (batch, head, q_idx):
            low = mix(low + index.to(torch.int32))
            high = mix(high + low)
        return low, high

    def keep_in_row(self, row: Row, kv_idx: Tensor) -> Tensor:
        """Boolean, of the broadcast shape of row and key indices."""
        low, high = row
        return mix(mix(low + kv_idx.to(torch.int32)) + high) >= self.threshold

    def keep(self, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """Boolean, of the broadcast shape of the four indices."""
        return self.keep_in_row(self.row(batch, head, q_idx), kv_idx)

"""Numbers as int8: rows in blocks, of which each head has a scale; and keys without what they have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_Q, BLOCK_K = 128, 64  # rows that share a scale: the kernel's tiles
MOST = 127


class Quantised(NamedTuple):
    """values int8 (B, S, H, D); scales fp32 (B, blocks, H): values times scales are the numbers."""

    values: Tensor
    scales: Tensor


def quantise(x: Tensor, block: int) -> Quantised:
    """fp32 (B, S, H, D) -> int8. The greatest of a block becomes 127; a block that is not finite has such a scale."""
    seqlen = x.shape[1]
    blocks = -(-seqlen // block)
    rows = F.pad(x, (0, 0, 0, 0, 0, blocks * block - seqlen)).unflatten(1, (blocks, block))
    largest = rows.abs().amax((2, 4))
    scales = torch.where(largest == 0, 1.0, largest / MOST)
    values = (rows / scales[:, :, None, :, None]).round().nan_to_num(0.0).to(torch.int8)
    return Quantised(values.flatten(1, 2)[:, :seqlen].contiguous(), scales)


def smoothed(k: Tensor) -> Tensor:
    """Keys (B, S, H, D) in fp32, less their mean over S.

    All scores of a query lose the same by that, and a softmax does not notice; but keys often share a large offset,
    which would take most of the 8 bits.
    """
    k = k.float()
    return k - k.mean(1, keepdim=True)

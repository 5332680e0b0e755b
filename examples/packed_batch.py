"""A training step on documents of any lengths, packed behind one another: no padding, and no token sees its neighbour.

    python examples/packed_batch.py

flash_attn_varlen_qkvpacked_func computes attention inside each document, told apart by cu_seqlens alone. The same
step, document by document with PyTorch's scaled_dot_product_attention, gives the same output and the same gradients.
"""

from __future__ import annotations

import sys
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_fa import flash_attn_varlen_qkvpacked_func

LENGTHS = [70, 1, 33, 128, 0, 57]  # a document may be empty
NHEADS, HEAD_DIM = 4, 32
WIDTH = NHEADS * HEAD_DIM
TOLERANCE = 1e-5  # of the greatest element: roundings of fp32


def packed_attention(x: Tensor, weight: Tensor) -> Tensor:
    """x (total, width) of all documents -> attention's output, (total, width)."""
    cu_seqlens = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
    qkv = F.linear(x, weight).unflatten(-1, (3, NHEADS, HEAD_DIM))  # (total, 3, heads, head_dim)
    return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max(LENGTHS), causal=True).flatten(-2)


def looped_attention(x: Tensor, weight: Tensor) -> Tensor:
    """The same, one document at a time."""
    outs = []
    for document in x.split(LENGTHS):
        qkv = F.linear(document, weight).unflatten(-1, (3, NHEADS, HEAD_DIM))
        q, k, v = qkv.permute(1, 2, 0, 3)  # (heads, seqlen, head_dim) each
        outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(-2))
    return torch.cat(outs)


def main() -> int:
    torch.manual_seed(0)
    total = sum(LENGTHS)
    x = torch.randn(total, WIDTH, requires_grad=True)
    weight = (torch.randn(3 * WIDTH, WIDTH) / WIDTH**0.5).requires_grad_()
    target = torch.randn(total, WIDTH)
    right = True
    results = []
    for attention in (packed_attention, looped_attention):
        out = attention(x, weight)
        results.append((out, *torch.autograd.grad(F.mse_loss(out, target), (x, weight))))
    padded = len(LENGTHS) * max(LENGTHS)
    print(f"{len(LENGTHS)} documents, {total} tokens packed; padded to the longest they would be {padded}")
    for name, ours, theirs in zip(("out", "gradient of x", "gradient of the weight"), *results, strict=True):
        apart = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        right &= apart <= TOLERANCE
        print(f"{name}: differs from the loop's by {apart:.1e} of its greatest element, allowed {TOLERANCE:.0e}")
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

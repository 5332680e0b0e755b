"""A vision transformer's block on images of two sizes, written for xformers, on our memory_efficient_attention.

    python examples/leaving_xformers.py

Images are packed into one row, and BlockDiagonalMask lets each see itself alone, as DINOv2 does it. The import is the
whole difference. Output and gradients are those of a call of scaled_dot_product_attention for each size.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_fa.xformers_api import AttentionBias, BlockDiagonalMask, memory_efficient_attention

WIDTH, NHEADS = 96, 4
IMAGES = [(2, 197), (8, 37)]  # how many, and of how many tokens: large crops, and small ones
TOLERANCE = 1e-5  # of the greatest element: roundings of fp32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, attn_bias: AttentionBias | None) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, NHEADS, -1)).unbind(2)
        if attn_bias is None:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        else:
            out = memory_efficient_attention(q, k, v, attn_bias=attn_bias)
        x = x + self.projection(out.flatten(-2))
        result: Tensor = x + self.mlp(self.after(x))
        return result


def results(block: Block, outs: list[Tensor]) -> list[Tensor]:
    loss = torch.stack([out.square().mean() for out in outs]).sum()
    return [*(out.detach() for out in outs), *torch.autograd.grad(loss, tuple(block.parameters()))]


def main() -> int:
    torch.manual_seed(0)
    block = Block()
    images = [torch.randn(batch, tokens, WIDTH) for batch, tokens in IMAGES]
    mask, row = BlockDiagonalMask.from_tensor_list(images)
    ours = results(block, mask.split(block(row, mask)))
    each = results(block, [block(x, None) for x in images])
    apart = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, each, strict=True))
    print(f"{len(images)} sizes in one row of {row.shape[1]} tokens")
    print(f"outputs and gradients differ by at most {apart:.1e} of the greatest, allowed {TOLERANCE:.0e}")
    right = apart <= TOLERANCE
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

"""A vision-transformer-like block written for PyTorch's scaled_dot_product_attention, run by our ops without an edit.

    python examples/sdpa_block.py

Inside `with compiled_fa.sdpa():` nn.MultiheadAttention, and all else that calls F.scaled_dot_product_attention, is
served by our ops where they can serve, eagerly and in compiled code. Output and gradients are PyTorch's. With
everywhere=True that is also what PyTorch has a fused kernel for, so that both can be compared here on a CPU.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compiled_fa

WIDTH, NHEADS, TOKENS = 96, 4, 197
TOLERANCE = 1e-5  # of the greatest element: roundings of fp32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, NHEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.after(x))
        return out


def step(block: Block, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    out = block(x)
    return (out, *torch.autograd.grad(F.mse_loss(out, target), tuple(block.parameters())))


def main() -> int:
    torch.manual_seed(0)
    block = Block()
    x, target = torch.randn(2, 2, TOKENS, WIDTH).unbind(0)
    theirs = step(block, x, target)
    pytorchs = F.scaled_dot_product_attention
    with compiled_fa.sdpa(everywhere=True) as calls:
        ours = step(block, x, target)
    undone = F.scaled_dot_product_attention is pytorchs
    print(f"{calls}; undone: {undone}")
    apart = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))
    print(
        f"output and {len(ours) - 1} gradients differ by at most {apart:.1e} of the greatest, allowed {TOLERANCE:.0e}"
    )
    right = undone and calls.served == 1 and apart <= TOLERANCE
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

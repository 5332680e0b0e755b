"""Train a small model whose attention is flash_attn_func, the whole step one graph: torch.compile(fullgraph=True).

    python examples/train_compiled.py

The model has 4 query heads on 2 key heads (GQA) and sees no later token (causal). Its twin, equal in everything but
attention, calls PyTorch's scaled_dot_product_attention, uncompiled; the two learn alike, to rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compiled_fa import flash_attn_func

BATCH, SEQLEN, VOCABULARY = 4, 64, 32
NHEADS, NHEADS_K, HEAD_DIM = 4, 2, 16
WIDTH = NHEADS * HEAD_DIM
STEPS = 12
TOLERANCE = 1e-4  # in nats: roundings of fp32 that 12 steps let grow

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(batch, seqlen, heads, head_dim), as flash_attn has it."""
    return flash_attn_func(q, k, v, causal=True)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class Model(nn.Module):
    """One layer of attention between an embedding and the logits."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(SEQLEN, WIDTH)
        self.q = nn.Linear(WIDTH, NHEADS * HEAD_DIM, bias=False)
        self.kv = nn.Linear(WIDTH, 2 * NHEADS_K * HEAD_DIM, bias=False)
        self.out = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight
        q = self.q(x).unflatten(-1, (NHEADS, HEAD_DIM))
        k, v = self.kv(x).unflatten(-1, (2, NHEADS_K, HEAD_DIM)).unbind(2)
        logits: Tensor = self.out(x + self.attention(q, k, v).flatten(-2))
        return logits


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(attention: Attention, compiled: bool) -> list[float]:
    """The loss of every step, from the same weights on the same tokens each time."""
    torch.manual_seed(0)
    model = Model(attention)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    step = torch.compile(next_token_loss, fullgraph=True) if compiled else next_token_loss
    tokens = torch.arange(SEQLEN + 1) * torch.arange(1, BATCH + 1)[:, None] % VOCABULARY
    losses = []
    for _ in range(STEPS):
        loss = step(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> int:
    ours, theirs = train(flash, compiled=True), train(sdpa, compiled=False)
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    right = apart <= TOLERANCE and ours[-1] < ours[0]
    print(f"loss {ours[0]:.4f} -> {ours[-1]:.4f} in {STEPS} steps; with SDPA {theirs[0]:.4f} -> {theirs[-1]:.4f}")
    print(f"greatest difference of a step: {apart:.1e}, allowed {TOLERANCE:.0e}: {'right' if right else 'WRONG'}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
